"""What trained models are worth: held-out likelihood, and the text that they write, judged beside human text.

`rdtrain evaluate` runs `command.evaluate`; docs/evaluation.md says what each number means and does not mean.
"""
