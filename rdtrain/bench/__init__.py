"""`rdtrain bench`: what a training step costs, in time and memory, of any config and of its baselines beside it.

`command.py` is the whole, top to bottom: `arms.py` makes the configs of a comparison or a sweep, `measure.py` times the steps of one,
`memory.py` and `trace.py` look inside a step, and `report.py` shows the results. The steps are those of the training loop.

`python -m rdtrain.bench.generation` does so of generation: `generation.py` measures, `generation_arms.py` makes what is measured, and
`generation_report.py` shows it.
"""
