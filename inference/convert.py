"""DeepSeek's `inference/convert.py` by its arguments: `blockscale convert`, whose own options may follow."""

from argparse import ArgumentParser
from contextlib import suppress

from blockscale.checkpoint.config_fields import ConfigFields
from blockscale.checkpoint.model_config import read_config
from blockscale.checkpoint.source import open_source
from blockscale.cli.main import main
from blockscale.errors import BlockscaleError

if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--hf-ckpt-path", required=True)
    parser.add_argument("--save-path", required=True)
    parser.add_argument("--n-experts", type=int, required=True)
    parser.add_argument("--model-parallel", required=True)
    arguments, rest = parser.parse_known_args()
    path = arguments.hf_ckpt_path
    with suppress(BlockscaleError):  # `convert` will tell what is wrong
        experts = ConfigFields(read_config(open_source(path))).experts("n_routed_experts")
        if arguments.n_experts != experts:
            parser.error(f"argument --n-experts: config.json says {experts}, not {arguments.n_experts}")
    main(["convert", path, arguments.save_path, "--mp", arguments.model_parallel, *rest])
