"""``python -m fp8_compile.recipes``: the table of all recipes."""

from . import table

print(table())
