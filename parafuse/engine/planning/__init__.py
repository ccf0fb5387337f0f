"""The planner: facts of a model, facts of machines, what any plan costs, and which one is best.

`facts`, `machine`, `cost`, `search`, `turns` and `explain` are pure and torch-free; `gather` and `measure` make
facts."""
