"""Whether an engine loads a checkpoint as it was meant, told from headers and config.json alone.

Every rule is a small function from a `Subject` to findings. What the rules are read from:

    vLLM 0.33             quantization/fp8.py, quantization/utils/{quant_utils,fp8_utils}.py,
                          quantization/compressed_tensors/{compressed_tensors,utils}.py and
                          compressed_tensors_moe/compressed_tensors_moe_w4a8_fp8.py
    SGLang 0.5.23         srt/layers/quantization/{fp8,w4afp8,utils,fp8_utils}.py,
                          srt/layers/quantization/compressed_tensors/compressed_tensors.py
    transformers 5.23     quantizers/quantizers_utils.py, quantizers/quantizer_finegrained_fp8.py,
                          integrations/{finegrained_fp8,compressed_tensors}.py, utils/quantization_config.py

vLLM and SGLang need a GPU to be run: these rules are read, not tried, some of them (what compressed-tensors
and w4afp8 take) in copies of their repositories whose release is not known. Of transformers and the
compressed-tensors package the tests run the code itself.
"""
