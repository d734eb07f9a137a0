"""DeepSeek's `inference/fp8_cast_bf16.py` by its arguments: `blockscale dequantize`."""

from argparse import ArgumentParser

from blockscale.cli.main import main

if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--input-fp8-hf-path", required=True)
    parser.add_argument("--output-bf16-hf-path", required=True)
    arguments = parser.parse_args()
    main(["dequantize", arguments.input_fp8_hf_path, arguments.output_bf16_hf_path])
