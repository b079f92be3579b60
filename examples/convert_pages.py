"""Convert PDFs and scanned pages to Markdown (HTML, JSON, DocTags) with granite-docling.

    pip install 'smolvlm-jax[documents,hub]'
    python examples/convert_pages.py papers converted --form markdown

Each PDF or picture in `papers` becomes a document in `converted/documents`. A page that cannot be read leaves a gap that names
it. Run the same command again after an interruption, and it goes on.
"""

import argparse
from pathlib import Path

from smolvlm_jax.batch import BatchConfig, PictureOptions, run_batch
from smolvlm_jax.engine import SamplingParams


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("input", help="PDF, picture, or a directory or glob of them")
    parser.add_argument("output", help="directory")
    parser.add_argument("--form", default="markdown", help="markdown, html, json or doctags")
    parser.add_argument("--model", default="ibm-granite/granite-docling-258M")
    parser.add_argument("--dpi", type=float, help="resolution of pages of PDFs (default: 144)")
    parser.add_argument("--max-new-tokens", type=int, default=4096, help="of a page; an answer that is longer is cut off")
    options = parser.parse_args(arguments)
    config = BatchConfig(
        input=options.input,
        output=options.output,
        model=options.model,
        prompt="Convert this page to docling.",
        document=options.form,
        sampling=SamplingParams(max_new_tokens=options.max_new_tokens),
        pictures=PictureOptions(pdf_dpi=options.dpi),
    )
    summary = run_batch(config)
    for path in sorted((Path(options.output) / "documents").rglob("*.*")):
        print(path)
    print(f"{summary['answers']} pages, {summary['errors']} missing")
    return summary


if __name__ == "__main__":
    main()
