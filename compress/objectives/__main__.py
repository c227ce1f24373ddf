"""python -m compress.objectives: the tables of docs/objectives.md."""

from compress.objectives.table import markdown

print(markdown())
