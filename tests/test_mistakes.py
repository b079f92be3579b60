"""Mistakes on the command line: each is at most three lines that say what is wrong, where, and what to do; exit code 2, or 1
where the world is at fault. No traceback, and nothing is left behind."""

import functools
import json
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pdf_files import lines, pdf
from PIL import Image

from smolvlm_jax import (
    AutoModelForVision2Seq,
    GenerationConfig,
    SmolVLMConfig,
    SmolVLMProcessor,
    init_params,
    load,
    make_mesh,
    resolve,
    save,
    save_hf,
)
from smolvlm_jax import generate as generate_ids
from smolvlm_jax.batch import BatchConfig
from smolvlm_jax.cli import main
from smolvlm_jax.convert.conversion import convert
from smolvlm_jax.engine import Engine, EngineConfig
from smolvlm_jax.errors import ArgumentError, InputError, SmolVLMError
from smolvlm_jax.generation_config import SamplingParams
from smolvlm_jax.plan import PlanConfig, Workload
from smolvlm_jax.processing import SmolVLMImageProcessor
from smolvlm_jax.train import TrainConfig
from smolvlm_jax.train.config import DataConfig, LoraConfig, MeshConfig

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "What number is written here?"
IMAGE = SmolVLMConfig.from_pretrained(resolve("tiny")).image_token_id


def generate(*words: str) -> list[str]:
    return ["generate", "--model", "tiny", *words, QUESTION]


def batch(source: str, *words: str) -> list[str]:
    return ["batch", source, "out", "--model", "tiny", "--prompt", QUESTION, *words]


def train(*words: str) -> list[str]:
    return ["train", "good.yaml", "output=out", *words]


# What is typed, the exit code, and words that the answer has.
FAST: dict[str, tuple[list[str], int, str]] = {
    "no command": ([], 2, "COMMAND is missing"),
    "a mistyped command": (["genrate", "What?"], 2, "did you mean generate?"),
    "an option before the command": (["--model", "tiny", "generate"], 2, "smolvlm-jax COMMAND --model"),
    "no question": (["generate", "--model", "tiny"], 2, "pass PROMPT"),
    "an empty question": (["generate", "--model", "tiny", " "], 2, "pass PROMPT"),
    "an option without its value": (["generate", "--image"], 2, "expected one argument"),
    "an unknown option": (generate("--max-tokens", "4"), 2, "no option --max-tokens; did you mean --max-new-tokens"),
    "no number": (generate("--max-new-tokens", "many"), 2, "--max-new-tokens: invalid int value: 'many'"),
    "an unknown dtype": (generate("--dtype", "int3"), 2, "float32, bfloat16"),
    "no JSON": (generate("--size", "{longest: 3}"), 2, "--size: invalid JSON value"),
    "a negative limit": (generate("--max-tiles", "-3"), 2, "max_tiles is -3; it cannot be negative"),
    "a page that there is not": (generate("--image", "number.png", "--pages", "5"), 2, "there is no page 5"),
    "frames without a video": (generate("--image", "number.png", "--fps", "2"), 2, "no video in the question; leave it out"),
    "tiles without a picture": (generate("--max-tiles", "2"), 2, "no picture in the question; leave it out"),
    "a temperature that nothing reads": (generate("--temperature", "0.5"), 2, "--temperature: without effect"),
    "a seed that nothing reads": (generate("--seed", "5"), 2, "--seed: without effect"),
    "no model of that name": (["generate", "--model", "tinny", "x"], 2, "not a bundled name (tiny)"),
    "a Hub id without owner": (["generate", "--model", "SmolVLM-256M-Instruct", "x"], 2, "did you mean HuggingFaceTB/"),
    "a path that is not there": (["generate", "--model", "/no/such/dir", "x"], 2, "no model '/no/such/dir'"),
    "a file for a model": (["generate", "--model", "m/model.safetensors", "x"], 2, "pass the directory"),
    "a run that has not ended": (["generate", "--model", "run", "x"], 2, "its model once it has ended"),
    "an adapter that is none": (generate("--adapter", "m"), 2, "no adapter_config.json"),
    "a base without an adapter": (["generate", "--base", "tiny", "x"], 2, "pass --adapter DIR"),
    "a URL of no store": (["generate", "--model", "ftp://x/y", "x"], 2, "scheme s3 or gs"),
    "a directory without a model": (["generate", "--model", "empty", "x"], 2, "download the whole repository"),
    "no config": (["convert", "noconfig", "out"], 2, "pass --config FILE"),
    "a broken config": (["convert", "badconfig", "out"], 2, "badconfig/config.json is not valid JSON"),
    "another architecture": (["convert", "other", "out"], 2, "expected 'smolvlm' or 'idefics3'"),
    "weights that are cut off": (["convert", "cut", "out"], 2, "incomplete download"),
    "no weights": (["convert", "noweights", "out"], 2, "has neither *.safetensors"),
    "a picture for a model": (["convert", "number.png", "out"], 2, "pass its directory"),
    "an existing destination": (["convert", "tiny", "filled"], 2, "choose another name"),
    "--force over what is no checkpoint": (["convert", "tiny", "filled", "--force"], 2, "is not a checkpoint"),
    "the source as destination": (["convert", "m", "m"], 2, "choose another destination"),
    "a destination that takes no files": (["convert", "tiny", "/proc/out"], 2, "cannot write /proc/out"),
    "a destination below a file": (["convert", "tiny", "number.png/out"], 2, "number.png is not a directory"),
    "a destination below a device": (["convert", "tiny", "/dev/full/out"], 2, "/dev/full is not a directory"),
    "a destination inside the source": (["convert", "m", "m/inside"], 2, "lies inside the source"),
    "4 bits, to convert": (["convert", "tiny", "out", "--quantize", "int4"], 2, "leave it out to keep the weights as they are"),
    "8 bits as a dtype": (["convert", "tiny", "out", "--dtype", "int8"], 2, "smolvlm-jax convert SOURCE DEST --quantize int8"),
    "a default by name": (generate("--dtype", "auto"), 2, "auto is none of float32, bfloat16; leave it out"),
    "torch's option": (["convert", "tiny", "out", "--torch_dtype", "bf16"], 2, "did you mean --dtype?"),
    "a source as an option": (
        ["convert", "--model", "tiny", "--output", "out"],
        2,
        "SOURCE is the first word: smolvlm-jax convert",
    ),
    "a destination as an option": (["convert", "tiny", "--output", "out"], 2, "DEST is the second word: smolvlm-jax convert"),
    "models as options": (["verify", "--a", "tiny", "--b", "m"], 2, "the first two words: smolvlm-jax verify A B"),
    "an empty directory for a model": (["convert", "empty", "out"], 2, "the directory is empty; download the whole repository"),
    "a shard that is missing": (
        ["convert", "shards", "out"],
        2,
        "1 of the 4 files that the names of the others count is not there",
    ),
    "no size": (["convert", "tiny", "out", "--to", "hf", "--max-shard-size", "big"], 2, "with KB, MB, GB"),
    "a config that is not there": (["convert", "m", "out", "--config", "no.json"], 2, "no file no.json: --config"),
    "no mesh": (["convert", "tiny", "out", "--mesh", "fsdp=x"], 2, "AXIS=SIZE"),
    "a revision of what is local": (["convert", "tiny", "out", "--revision", "v2"], 2, "only models of the Hub"),
    "a format there is not": (["convert", "tiny", "out", "--to", "gguf"], 2, "gguf is none of orbax, hf"),
    "one word too few": (["convert", "tiny"], 2, "DEST is missing"),
    "one word too many": (["convert", "tiny", "out", "more"], 2, "one word too many"),
    "verify of nothing": (["verify", "tiny", "nowhere"], 2, "no model 'nowhere'"),
    "position ids of nothing": (["verify", "tiny", "m", "--position-ids", "intended"], 2, "add --stages"),
    "a size that nothing reads": (["convert", "tiny", "out", "--max-shard-size", "1GB"], 2, "cuts safetensors files"),
    "no input": (batch("nowhere.jsonl"), 2, "no such file or directory"),
    "a glob of nothing": (batch("*.webp"), 2, "no picture and no video in '*.webp'"),
    "an empty directory": (batch("empty"), 2, "no picture and no video"),
    "a directory of other files": (batch("texts"), 2, "it has 1 .docx"),
    "a file of another kind": (batch("texts/a.docx"), 2, "of a kind that is not read"),
    "pictures without a question": (["batch", "pictures", "out", "--model", "tiny"], 2, "--prompt"),
    "no model": (["batch", "pictures", "out", "--prompt", "x"], 2, "--model NAME"),
    "slots for one of two rings": (batch("pictures", "--slots", "8"), 2, "for example --slots"),
    "an empty file": (batch("empty.jsonl"), 2, "'empty.jsonl' holds no records"),
    "a file of blank lines": (batch("blank.jsonl"), 2, "'blank.jsonl' holds no records"),
    "a table without rows": (batch("header.csv"), 2, "'header.csv' holds no records"),
    "an empty array": (batch("list.json"), 2, "'list.json' holds no records"),
    "an empty archive": (batch("none.tar"), 2, "'none.tar' holds no records"),
    "a Parquet file without rows": (batch("zero.parquet"), 2, "'zero.parquet' holds no records"),
    "files that may not be read": (batch("pictures", "--no-files"), 2, "--no-files (files) forbids to read"),
    "columns of pictures": (batch("pictures", "--keep", "label"), 2, "'pictures' holds files, which have no columns"),
    "frames of pictures": (batch("pictures", "--num-frames", "4"), 2, "there is no video in 'pictures'"),
    "two columns for one": (
        batch("a.jsonl", "--column", "image=a", "--column", "image=b"),
        2,
        "image=a and image=b (columns): leave one out",
    ),
    "two columns to keep": (batch("a.jsonl", "--keep", "a", "--keep", "b"), 2, "a list is written as one, --keep a,b"),
    "some pages of a PDF": (batch("scan.pdf", "--pages", "2"), 2, 'a file of records, {"document": "FILE.pdf#2"} a line'),
    "the first page of PDFs": (batch("scan*.pdf", "--pages", "first"), 2, "--pages (pages) has no effect"),
    "a limit of pages": (batch("scan.pdf", "--max-pages", "2"), 2, '{"document": "FILE.pdf#2"} a line'),
    "tiles without splitting": (
        batch("pictures", "--no-image-splitting", "--max-tiles", "5"),
        2,
        "--max-tiles (max_tiles) has no",
    ),
    "tiles of a question without splitting": (
        generate("--image", "number.png", "--no-image-splitting", "--max-tiles", "5"),
        2,
        "--max-tiles (max_tiles) has no effect where a picture is one tile",
    ),
    "a PDF in a question": (generate("--image", "scan.pdf"), 2, "smolvlm-jax batch scan.pdf OUTPUT"),
    "a page of a PDF in a question": (
        generate("--image", "scan.pdf#2", "--pages", "1"),
        2,
        "smolvlm-jax batch scan.pdf OUTPUT",
    ),
    "the scale of pages in a question": (
        generate("--pdf-dpi", "99"),
        2,
        "no option --pdf-dpi; PDFs are read by smolvlm-jax batch",
    ),
    "a question as an option": (["generate", "--prompt", "What?"], 2, "PROMPT is the argument without an option"),
    "a picture as a word": (
        ["generate", "number.png", "What?"],
        2,
        "What?: one word too many; PROMPT is one word, in quotes, and",
    ),
    "files of a pattern": (
        ["batch", "a.png", "b.png", "c.png", "out", "--model", "tiny"],
        2,
        "c.png, out: 2 words too many; INPUT is one word: name the folder, or put a pattern in quotes",
    ),
    "the opposite of a limit": (
        generate("--min-new-tokens", "3"),
        2,
        "no option --min-new-tokens; the least length of answers",
    ),
    "the opposite of an option": (batch("pictures", "--min-tiles", "3"), 2, "no option --min-tiles (help"),
    "no list of numbers": (batch("pictures", "--slots", "x"), 2, "not a list of whole numbers"),
    "an output in the input": (["batch", "pictures", *batch("pictures")[1:2], *batch("x")[3:]], 2, "pictures"),
    "a mistyped option in place of a recipe": (["train", "--lst"], 2, "no option --lst; did you mean --list?"),
    "an unknown form of attention": (batch("pictures", "--attention", "einsun"), 2, "attention 'einsun' is none of"),
    "caches out of order": (batch("pictures", "--ring-lengths", "512,256"), 2, "ring_lengths ascend"),
    "an output that cannot be made": (["batch", "pictures", "/proc/x", *batch("x")[3:]], 2, "cannot be made at /proc/x"),
    "an output where nothing can be written": (["batch", "pictures", "/proc", *batch("x")[3:]], 2, "choose another directory"),
    "an output in a folder of pictures": (["batch", "pictures", "pictures/o", *batch("x")[3:]], 2, "where INPUT is read from"),
    "an option of vLLM": (batch("pictures", "--tensor-parallel-size", "2"), 2, "did you mean --mesh tensor=N?"),
    "an option that another command has": (generate("--batch-size", "2"), 2, "no option --batch-size (help"),
    "a job to go on with": (batch("pictures", "--resume"), 2, "run the same command again"),
    "records as an option": (["batch", "--input", "pictures", "--model", "tiny"], 2, "INPUT is the first argument"),
    "an option like no other": (batch("pictures", "--verbose"), 2, "no option --verbose (help"),
    "an output of a run that cannot be made": (train("output=/proc/x"), 2, "output cannot be made at /proc/x: "),
    "a batch that the devices cannot share": (train("data.batch_size=6"), 2, "write data.batch_size=8, or mesh.devices=6"),
    "columns of other names": (train("data.train=other.jsonl"), 2, "columns: [[prompt, query], [answer, label.0]]"),
    "an empty name": (["batch", "", *batch("x")[2:]], 2, "an empty name"),
    "no recipe": (["train"], 2, "RECIPE is missing"),
    "a mistyped recipe": (["train", "lora-265m"], 2, "did you mean lora-256m?"),
    "a recipe that is not there": (["train", "my.yaml"], 2, "no recipe 'my.yaml'"),
    "broken YAML": (["train", "broken.yaml"], 2, "not valid YAML"),
    "TOML": (["train", "recipe.toml"], 2, "holds no recipe"),
    "a picture for a recipe": (["train", "number.png"], 2, "cannot read number.png"),
    "a mistyped key": (train("learning_rte=1"), 2, "did you mean learning_rate"),
    "a mistyped nested key": (train("data.lenght=3"), 2, "did you mean length?"),
    "a value out of range": (train("steps=-3"), 2, "from 1 to"),
    "a value of another type": (train("learning_rate=fast"), 2, "needs a value of type float"),
    "a key without a value": (train("steps"), 2, "'steps' is not KEY=VALUE"),
    "a key as a switch": (train("--steps", "3"), 2, "written without dashes, steps=VALUE"),
    "a key set twice": (train("lora.rank=4", "lora={rank: 8}"), 2, "leave one out"),
    "a model where an export would go": (["train", "good.yaml", "output=trained"], 2, "trained/model exists, and the export"),
    "a shell there is not": (["completion", "fish"], 2, "fish is none of bash, zsh, tcsh"),
    "a word too many for models": (["models", "tiny"], 2, "tiny: one word too many"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with what the mistakes are made with."""
    place = tmp_path_factory.mktemp("mistakes")
    for name in ("m", "noconfig", "badconfig", "other", "cut", "noweights"):
        shutil.copytree(resolve("tiny"), place / name)
    (place / "noconfig/config.json").unlink()
    (place / "badconfig/config.json").write_text("{")
    (place / "other/config.json").write_text('{"model_type": "llama"}')
    weights = place / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    (place / "noweights/model.safetensors").unlink()
    convert("tiny", place / "shards", to="hf", max_shard_size="1MB", quiet=True)
    (place / "shards/model-00002-of-00004.safetensors").unlink()
    (place / "shards/model.safetensors.index.json").unlink()
    for name in ("empty", "filled", "texts", "pictures", "run/checkpoints", "trained/model"):
        (place / name).mkdir(parents=True)
    (place / "run/run.json").write_text("{}")
    for name in ("filled/notes.txt", "texts/a.docx", "texts/b.txt"):
        (place / name).write_text("hello")
    for name in ("number.png", "pictures/a.png"):
        shutil.copy(ROOT / "examples/number.png", place / name)
    (place / "broken.yaml").write_text("steps: [")
    (place / "scan.pdf").write_bytes(pdf([lines("page")] * 3))
    for name, text in {"empty.jsonl": "", "blank.jsonl": "\n\n", "header.csv": "prompt,image\n", "list.json": "[]"}.items():
        (place / name).write_text(text)
    tarfile.open(place / "none.tar", "w").close()
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), place / "zero.parquet")
    (place / "recipe.toml").write_text('model = "tiny"')
    (place / "train.jsonl").write_text(json.dumps({"prompt": "hi", "answer": "there"}) + "\n")
    (place / "other.jsonl").write_text(json.dumps({"query": "hi", "label": ["there"]}) + "\n")
    (place / "good.yaml").write_text("{model: tiny, steps: 1, data: {train: train.jsonl, length: 64, batch_size: 8}}")
    yield place
    shutil.rmtree(place)


@pytest.mark.parametrize("name", FAST)
def test_a_mistake_is_told_in_three_lines(name, place, monkeypatch, capsys):
    words, code, said = FAST[name]
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    try:
        found = main(words)
    except SystemExit as stop:
        found = stop.code
    out, err = capsys.readouterr()
    assert (found, out) == (code, ""), err
    assert said in err and "Traceback" not in err and 1 <= err.count("\n") <= 3, err
    assert sorted(place.rglob("*")) == before


# What is called, and words that the answer has; each is a TypeError too.
CALLS = {
    "a mistyped setting": (lambda: BatchConfig(input="a", outptu="b"), "no argument 'outptu'; did you mean 'output'?"),
    "a setting that is missing": (lambda: BatchConfig(input="a", model="tiny"), "'output'; call it as BatchConfig(input=…"),
    "settings without their names": (lambda: BatchConfig("a", "b"), "BatchConfig: too many positional arguments"),
    "letters in another order": (lambda: PlanConfig(modle="256m"), "did you mean 'model'?"),
    "a setting of a recipe": (lambda: TrainConfig(step=3), "did you mean 'steps'?"),
    "a name of another library": (lambda: LoraConfig(r=8), "LoraConfig has no argument 'r'; it has alpha, rank, targets"),
    "another library's limit": (lambda: SamplingParams(max_tokens=5), "did you mean 'max_new_tokens'?"),
    "a mistyped size of the engine": (lambda: EngineConfig(slot=8), "did you mean 'slots'?"),
    "an engine's argument": (lambda: Engine(1, 2, 3, confg=1), "Engine has no argument 'confg'; did you mean 'config'?"),
    "an engine without parameters": (lambda: Engine("tiny"), "call it as Engine(model=…, params=…, processor=…)"),
    "an argument of save_hf": (lambda: save_hf("x", {}, {}, max_shard=3), "did you mean 'max_shard_size'?"),
    "an argument of load": (lambda: load("tiny", atention="auto"), "did you mean 'attention'?"),
    "a revision without its name": (lambda: load("tiny", None, None, "main"), "load: too many positional arguments"),
    "an axis": (lambda: make_mesh(dta=1), "did you mean 'data'?"),
    "an axis of another library": (lambda: make_mesh(model=4), "did you mean 'tensor'?"),
    "a short name of an axis": (lambda: make_mesh(dp=4), "did you mean 'data'?"),
    "torch's dtype": (lambda: load("tiny", torch_dtype="bf16"), "did you mean 'dtype'?"),
    "a limit of other servers": (lambda: GenerationConfig(max_tokens=3), "did you mean 'max_new_tokens'?"),
    "a number of answers": (lambda: GenerationConfig(n=3), "did you mean 'num_return_sequences'?"),
    "where to convert to": (lambda: convert("tiny", output="x"), "did you mean 'destination'?"),
    "no destination": (lambda: convert("tiny"), "call it as convert(source=…, destination=…)"),
}  # fmt: skip


def closed_picture() -> Image.Image:
    picture = Image.open(ROOT / "examples/number.png")
    picture.close()
    return picture


@functools.cache
def loaded():
    return AutoModelForVision2Seq.from_pretrained("tiny")


@functools.cache
def processor() -> SmolVLMProcessor:
    return SmolVLMProcessor.from_pretrained("tiny")


def number() -> Image.Image:
    return Image.open(ROOT / "examples/number.png")


# Values of another type.
VALUES = {
    "text for numbers": (lambda: BatchConfig(input="a", output="b", model="tiny", slots="8"), "slots is '8'; it needs"),
    "text for a number": (lambda: TrainConfig(steps="3"), "steps is '3'; it needs a value of type int"),
    "a path for sources": (
        lambda: DataConfig(train="x.jsonl"),
        "train is 'x.jsonl'; it needs a value of type tuple[Data",
    ),
    "text for an axis": (lambda: MeshConfig(data="2"), "data is '2'; it needs a value of type int"),
    "a dict for settings": (lambda: PlanConfig(workload={"tiles": 3}), "it needs a value of type Workload"),
    "text for tiles": (lambda: Workload(tiles="3"), "tiles is '3'; it needs a value of type int"),
    "arguments in another order": (
        lambda: save({}, "x", {}),
        "directory is a dict; pass a path: save(directory, ",
    ),
    "a name for a model": (lambda: save_hf("x", "tiny", {}), "model is 'tiny', a str; pass the model that load(source) gave"),
    "several models": (lambda: load(["tiny"]), "['tiny'] is a list, and no name: pass a string or a path"),
    "a name to make parameters of": (lambda: init_params("tiny"), "model is 'tiny', a str; pass a description"),
    "a picture that is closed": (lambda: SmolVLMImageProcessor()(closed_picture()), "is closed: pass it while it is open"),
    "image tokens without pictures": (
        lambda: generate_ids(*load("tiny"), input_ids=[[5, 6, IMAGE, IMAGE, 7]]),
        "the prompt has 2 image tokens",
    ),
    "parameters first": (lambda: generate_ids({}, None), "model is a dict; pass a model and its parameters"),
    "inputs without a model": (lambda: generate_ids({}), "generate(model, params, **inputs) with inputs = processor.enc"),
    "a text without a model": (lambda: generate_ids("hello"), "generate needs a model and its parameters"),
    "inputs in one piece": (lambda: generate_ids(*loaded(), {"input_ids": [[5]]}), "input_ids is a dict: pass what the proc"),
    "inputs in one piece, to a loaded model": (lambda: loaded().generate({"input_ids": [[5]]}), "by name, **inputs"),
    "a text to a loaded model": (lambda: loaded().generate("hello"), "input_ids is text, of which a processor makes arrays"),
    "a call with inputs in one piece": (lambda: loaded()({"input_ids": [[5]]}), "by name, **inputs"),
    "parameters one level down": (lambda: generate_ids(loaded().model, {"params": loaded().params}, [[5]]), 'params["params"]'),
    "apply with parameters alone": (lambda: loaded().model.apply(loaded().params, [[5]]), 'model.apply({"params": params}, '),
    "apply with inputs alone": (lambda: loaded().model.apply(input_ids=[[5]]), 'model.apply({"params": params}, **inputs)'),
    "apply with a loaded model": (lambda: loaded().model.apply(loaded()), 'model.apply({"params": params}, **inputs)'),
    "sizes of axes in one piece": (lambda: make_mesh((4, 2)), "give each axis its size, such as make_mesh(data=4, tensor=2)"),
    "texts that end answers": (lambda: generate_ids(*loaded(), [[5]], stop=["x"]), "SamplingParams(stop=…), and with --stop"),
    "pictures for generate": (lambda: generate_ids(*loaded(), images=[]), "a processor makes arrays of them"),
    "4 bits": (lambda: load("tiny", load_in_4bit=True), "smolvlm-jax convert SOURCE DEST --quantize int8, then load(DEST)"),
    "a quantization of transformers": (
        lambda: AutoModelForVision2Seq.from_pretrained("tiny", quantization_config={}),
        "smolvlm-jax convert SOURCE DEST --quantize int8, then load(DEST)",
    ),
    "a GPU that there is not": (lambda: loaded().cuda(), "there is no device 'cuda:0' here"),
    "parameters as in torch": (lambda: loaded().parameters(), "LoadedModel.parameters: params is a nested dict, jax.tree"),
    "a chat": (lambda: loaded().chat("hello"), "inputs = processor.encode_chat(messages), then generate(model"),
    "a text without <image>": (lambda: processor()(text="What?", images=[number()]), "write <image> where a picture belongs"),
    "a picture too many": (lambda: processor()(text="<image>", images=[number()] * 2), "or leave the picture out"),
    "a picture too few": (lambda: processor()(text="<image>"), "pass the pictures, images=[…], or in messages"),
    "None for a picture": (lambda: processor()(text="<image>", images=[None]), "images=[[picture], []]"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_does_not_fit_says_what_does(name):
    call, said = CALLS[name]
    with pytest.raises(ArgumentError) as found:
        call()
    assert isinstance(found.value, TypeError) and said in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize("name", VALUES)
def test_a_value_of_another_type_is_named(name):
    call, said = VALUES[name]
    with pytest.raises(SmolVLMError) as found:
        call()
    assert said in str(found.value) and "\n" not in str(found.value)


def test_an_error_from_within_a_call_stays_what_it_is(monkeypatch):
    def broken(self):
        raise TypeError("from within")

    monkeypatch.setattr(BatchConfig, "__post_init__", broken)
    with pytest.raises(TypeError, match="from within") as found:
        BatchConfig(input="a", output="b")
    assert not isinstance(found.value, InputError)
