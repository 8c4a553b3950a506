"""Training on several GPUs, measured: what `launch/scaling.sh` runs, a stage at a time.

`jobs.py` says what is measured, in which order and with which batches, and what does not fit; `measure.py` starts `rdtrain bench` for it.
`collectives.py` checks messages, `losses.py` holds layouts to one another on real steps, `resume.py` kills a rank and goes on elsewhere.
`findings.py` puts predictions beside what was measured, and `report.py` writes the page.
"""
