"""Other engines under the same load: each module is a program that any Python with its package can run.

They import nothing of apar but this package, so that `apar bench peers --peer-python` may name another environment.
"""

OWN = ("apar", "onnxruntime")
"""Peers that run in apar's own Python: its executor, and its graph with ONNX Runtime's own matrix kernels."""
MODULES = {
    "apar": "apar_onnx",
    "onnxruntime": "apar_onnx",
    "llama.cpp": "llama_cpp",
    "openvino": "openvino",
    "transformers": "transformers",
}
"""The module that runs each peer."""
PACKAGES = {
    "llama.cpp": "llama-cpp-python gguf",
    "openvino": "openvino",
    "transformers": "transformers torch",
}
"""What to install for each, as pip takes it."""
FORMATS = {"transformers": ("f32", "bf16")}
"""Weight formats of the peers that have not all."""
