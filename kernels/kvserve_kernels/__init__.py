"""Pure tensor functions: the arithmetic of compression, apart from formats and policy.

Each operation is a folder: ``<op>_ref.py`` is the definition, ``<op>_cpu.py`` the fast CPU path that must agree with it
bit by bit, ``<op>_triton.py`` the GPU path. Arrays are numpy; a bfloat16 array travels as the uint16 of its bits.
CPU kernels drop the interpreter lock, use one thread each and give the same bits on every machine.
"""

__all__: list[str] = []
