"""What runs in llama.cpp's process: its server, and nothing of torch, which would take seconds to load."""

import importlib
from multiprocessing.connection import Connection
from typing import Any, Final

PACKAGE: Final = "xllamacpp"


def serve(parent: Connection, file: str, threads: int, context: int, lookup: bool) -> None:
    """Serve until the parent closes its end; tells it the address, or why there is none."""
    binding: Any = importlib.import_module(PACKAGE)
    params = binding.CommonParams()
    params.model.path = file
    params.n_ctx = context
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_gpu_layers = 0
    params.fit_params = False  # nothing is to be adapted behind our back
    params.cache_ram_mib = params.n_ctx_checkpoints = 0
    params.ui = params.endpoint_slots = False
    params.verbosity = -1
    kind = "COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE" if lookup else "COMMON_SPECULATIVE_TYPE_NONE"
    params.speculative.types = [getattr(binding.common_speculative_type, kind)]
    try:
        server = binding.Server(params)
    except RuntimeError as error:
        parent.send(("", str(error)))
        return
    parent.send((server.listening_address, ""))
    try:
        parent.recv()
    except EOFError:
        return
