"""Answer a question about every picture of a Parquet file with Ray Data: Parquet in, Parquet out.

    python examples/ray_batch.py pictures.parquet answers --prompt "What number is written here?"

On a cluster of TPU hosts, one model per host: --resource TPU --amount 4 --replicas 8. Without --resource the model runs where
Ray finds a CPU.
"""

import argparse

import ray

from smolvlm_jax.batch.ray import SmolVLMPredictor, SmolVLMPreprocessor


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("input", help="Parquet with the columns id and image (bytes or paths)")
    parser.add_argument("output", help="directory for Parquet")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prompt", default="Can you describe this image?")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=512, help="a few times the engine's slots")
    parser.add_argument("--workers", type=int, default=2, help="CPU actors that prepare pictures")
    parser.add_argument("--replicas", type=int, default=1, help="copies of the model")
    parser.add_argument("--resource", help="what one copy of the model asks Ray for, e.g. TPU")
    parser.add_argument("--amount", type=float, default=1, help="how much of it")
    options = parser.parse_args(arguments)

    device = {"resources": {options.resource: options.amount}} if options.resource else {"num_cpus": 1}
    dataset = ray.data.read_parquet(options.input)
    dataset = dataset.map_batches(
        SmolVLMPreprocessor,
        fn_constructor_kwargs={"model": options.model, "prompt": options.prompt, "max_new_tokens": options.max_new_tokens},
        batch_size=32,
        concurrency=options.workers,
        num_cpus=1,
    )
    dataset = dataset.map_batches(
        SmolVLMPredictor,
        fn_constructor_kwargs={"model": options.model},
        batch_size=options.batch_size,
        concurrency=options.replicas,
        **device,
    )
    dataset.write_parquet(options.output)


if __name__ == "__main__":
    main()
