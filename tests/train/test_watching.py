"""What a run says: how far it is, what it skips, what does not fit, and the loss on held-out conversations."""

import json
import os
import re
import select
import sys
import termios
import threading

import pytest
from train_helpers import write_records

from smolvlm_jax import load, make_mesh, resolve, terminal
from smolvlm_jax.errors import ConfigError, InputError
from smolvlm_jax.processing import SmolVLMProcessor
from smolvlm_jax.train import progress
from smolvlm_jax.train.config import DataConfig, DataSource, EvaluationConfig, TrainConfig
from smolvlm_jax.train.evaluate import has_free_text, held_out
from smolvlm_jax.train.look import first_warnings
from smolvlm_jax.train.pipeline import TrainingData
from smolvlm_jax.train.progress import Display, shown_figures
from smolvlm_jax.train.records import open_records


@pytest.fixture(scope="module")
def processor():
    return SmolVLMProcessor.from_pretrained(resolve("tiny"))


class Clock:
    """The clock of `Display` and of the terminal. A test moves it; after each second the display is shown."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(terminal, "_said", 0.0)
        for module in (progress, terminal):
            monkeypatch.setattr(module, "time", self)
        monkeypatch.setattr(Display, "_tick", lambda display: None)

    def monotonic(self) -> float:
        return self.now

    def pass_seconds(self, display: Display, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1
            display._show()


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(progress, "on_terminal", lambda: False)
    return Clock(monkeypatch)


def test_off_a_terminal_nothing_is_silent_for_long(clock, capsys):
    """A line in thirteen seconds, while a step compiles as while steps go on. A quiet run says nothing."""
    with Display(50) as display:
        display.remark("model m")
        display.begin(10)
        display.doing("compiling the training step")
        clock.pass_seconds(display, 60)
        assert capsys.readouterr().err == "smolvlm-jax: model m\n" + "".join(
            f"smolvlm-jax: step 10 of 50, compiling the training step (0:{seconds})\n" for seconds in (13, 26, 39, 52)
        )
        display.advance()
        display.figures({"loss": 1.5, "learning_rate": 1e-4, "tokens_s": 1234.5, "padding": 0.25, "skipped": 0})
        said = "loss 1.5000, rate 0.0001, tokens/s 1,234, padding 25%"
        assert capsys.readouterr().err == f"smolvlm-jax: step 11 of 50, {said}\n"
        for _ in range(20):
            clock.pass_seconds(display, 2)
            display.advance()
        assert capsys.readouterr().err == "".join(
            f"smolvlm-jax: step {step} of 50, {said}, about {left} s left\n" for step, left in ((17, 72), (23, 58), (30, 41))
        )
    with Display(5, False) as display:
        display.remark("no word")
        display.begin(0)
        clock.pass_seconds(display, 60)
        display.figures({"loss": 1.0})
    assert capsys.readouterr().err == ""
    assert shown_figures({"loss": 2.0, "skipped": 3, "padding": "nan"}) == "loss 2.0000, steps not finite 3"


def test_the_clock_goes_on_by_itself(monkeypatch):
    shown = threading.Event()
    monkeypatch.setattr(progress, "_TICK_SECONDS", 0.01)
    monkeypatch.setattr(Display, "_show", lambda display: shown.set())
    with Display(5, True):
        assert shown.wait(60)


def test_on_a_terminal_the_bar_has_the_figures_and_what_is_going_on(capsys):
    with Display(4, True) as display:
        display.begin(1)
        display.doing("held-out answers, 3 of 9")
        display.doing("")
        display.advance()
        display.figures({"loss": 1.5, "held_out_loss": 2.0, "exact_match": 0.5, "learning_rate": 1e-4})
    said = capsys.readouterr().err
    assert "held-out answers, 3 of 9" in said and "2/4" in said
    assert "loss 1.5000, held out 2.0000, exact 50.0%, rate 0.0001" in said


def test_a_step_that_takes_long_is_named_with_a_clock(clock, capsys):
    with Display(9) as display:
        display.begin(0)
        display.doing("computing step 1 of 9", after=60)
        clock.pass_seconds(display, 30)
        assert "computing" not in capsys.readouterr().err
        display.doing("computing step 1 of 9", after=10)
        clock.pass_seconds(display, 20)
        assert "smolvlm-jax: computing step 1 of 9 (0:" in capsys.readouterr().err
        display.advance()
        display.finish()
        display.doing("writing out/model")
        clock.pass_seconds(display, 20)
    assert "smolvlm-jax: step 1 of 9, writing out/model (0:" in capsys.readouterr().err


@pytest.mark.parametrize("width", [0, 30, 100])
def test_the_bar_fits_a_terminal_of_any_width(width, monkeypatch):
    """Also one that does not know its width."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (0 if width == 0 else 24, width))
    with os.fdopen(theirs, "w") as terminal, Display(4, True) as display:
        monkeypatch.setattr(sys, "stderr", terminal)
        display.doing("opening tiny")
        display.begin(1)
        display.advance()
        display.figures({"loss": 1.5, "held_out_loss": 2.0, "exact_match": 0.5, "learning_rate": 1e-4, "tokens_s": 123.0})
        display.finish()
        said = ""
        while select.select([ours], [], [], 0.2)[0]:
            said += os.read(ours, 100_000).decode()
        monkeypatch.undo()
    os.close(ours)
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[\w", "", said))
    assert "opening tiny" in said and max(map(len, lines)) <= (width or 80)
    assert any(line.startswith(" 50%|") for line in lines), lines


@pytest.mark.thorough
def test_records_that_have_no_room_are_told_before_the_first_step(tmp_path, processor):
    records = open_records(str(write_records(tmp_path, 6)))
    assert first_warnings([records], processor, DataConfig(length=512)) == []
    with pytest.raises(
        ConfigError, match=r"^none of the 1 records makes a sample: 1 too long for a row \(data.length 8\)"
    ) as found:
        first_warnings([open_records(DataSource(str(tmp_path / "train.jsonl"), limit=1))], processor, DataConfig(length=8))
    assert "max_tiles" not in str(found.value)  # one tile alone does not fit
    (words,) = first_warnings([records], processor, DataConfig(length=512, tiles_per_row=1, too_long="drop_pictures"))
    assert "data.tiles_per_row 1" in words and "lose pictures" in words
    path = tmp_path / "missing.jsonl"
    lines = [json.dumps({"image": f"no{n}.png", "prompt": "What?", "answer": "x"}) for n in range(1, 33)]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ConfigError, match=r"^none of the 32 records makes a sample: 32 faulty, the first missing\.jsonl:1: "):
        first_warnings([open_records(str(path))], processor, DataConfig())
    (words,) = first_warnings([records, open_records(str(path))], processor, DataConfig())
    assert "warning: 20 of the first 26 records are faulty, the first missing.jsonl:1: " in words


@pytest.mark.thorough
def test_skipped_records_and_padding_are_told_once_with_why(tmp_path):
    path = write_records(tmp_path, 6)
    odd = ['{"messages": 5}', json.dumps({"prompt": "word " * 900, "answer": "x"})]
    path.write_text("\n".join([*path.read_text().splitlines(), *odd]) + "\n")
    config = DataConfig(train=(DataSource(str(path)),), length=256, batch_size=2, shuffle=False, window_rows=1)
    data = TrainingData(config, str(resolve("tiny")), seed=0)
    try:
        for _ in range(6):
            next(data)
        skipped, padding = data.remarks()
        assert "faulty, the first train.jsonl:7: messages needs a list" in skipped
        assert "too long for a row (data.length 256), the first train.jsonl:8" in skipped
        assert "places for tiles (no row so far has more: data.tiles_per_row=" in padding and data.remarks() == []
        assert len(data.told) == len(set(data.told)) == 2
        before = data.state()
        data.close()
        data = TrainingData(config, str(resolve("tiny")), seed=0)
        data.restore(before)
        for _ in range(12):
            next(data)
        skipped, _ = data.remarks()
        figures = data.figures()
        told = re.match(r"skipped so far, of (\d+) records read: (\d+) faulty, such as train.jsonl:7: ", skipped)
        read, faulty = told.groups()
        # Since the run began, as the figures are, and the window that is being read.
        assert figures["faulty"] >= 2 * before["counts"]["faulty"] > 0
        assert 0 <= int(faulty) - figures["faulty"] <= 1
        assert 0 <= int(read) - sum(figures[name] for name in ("samples", "faulty", "too_long")) <= 2
    finally:
        data.close()


def test_exact_match_is_for_answers_that_can_be_met_to_the_letter():
    assert not has_free_text([([], "12 and 7. The first."), ([], "4207")])
    long = "a sentence that goes on for rather more than eight words"
    assert has_free_text([([], long), ([], long), ([], "no")]) and not has_free_text([([], long), ([], "no")])


@pytest.mark.parametrize("path", ["nowhere.jsonl", "nobody/nothing", "gone/"])
def test_a_wrong_evaluation_path_names_the_evaluation(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^evaluation\.path: .*(no such file|holds no conversations)"):
        held_out(EvaluationConfig(path))


@pytest.mark.thorough
def test_the_held_out_loss_is_the_training_loss_of_the_same_records(tmp_path):
    """Packed in several batches, the last of them not full: as the mean over all learned tokens, one record a row."""
    import jax

    from smolvlm_jax.train.forward import token_losses
    from smolvlm_jax.train.held_out import HeldOutLoss
    from smolvlm_jax.train.packing import make_batch
    from smolvlm_jax.train.partition import Partition
    from smolvlm_jax.train.samples import Prepare
    from smolvlm_jax.train.state import create_state

    path = write_records(tmp_path, 9)
    path.write_text(path.read_text() + '{"messages": 5}\n')
    data = DataConfig(train=(DataSource(str(path)),), length=256, batch_size=4, tiles_per_row=12, window_rows=1)
    training = TrainingData(data, str(resolve("tiny")), seed=0)
    mesh = make_mesh(data=4, devices=jax.devices()[:4])
    model, params = load("tiny")
    partition = Partition.of(model, TrainConfig(steps=1, data=data))
    records, prepare = open_records(str(path)), Prepare(resolve("tiny"), data)
    settings = {"base": {}, "records": records, "count": 100, "data": data, "prepare": prepare, "shape": training.shape}
    loss = HeldOutLoss(model, partition, **settings, mesh=mesh)
    with Display(1, False) as display:
        found = loss(create_state(params, partition), display, lambda: False)
        assert loss(create_state(params, partition), display, lambda: True) is None
    samples = [prepare(records[n]) for n in range(9)]
    batches = [make_batch([[sample]], training.shape, 2) for sample in samples]
    one = jax.jit(lambda batch: token_losses(model, params, batch))
    alone = [one({name: value[:1] for name, value in batch.items()}) for batch in batches]
    want = sum(float(total) for total, _, _ in alone) / sum(int(count) for _, count, _ in alone)
    assert found is not None and found["held_out_loss"] == pytest.approx(want, rel=1e-4)
    assert found["held_out_skipped"] == 1 and "faulty" in loss.told[0]
