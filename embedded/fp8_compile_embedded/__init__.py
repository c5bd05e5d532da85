"""The directories of two trained pipelines; `fp8_compile.embedded` says where they are and how they are called."""

__version__ = "0.1.0"
