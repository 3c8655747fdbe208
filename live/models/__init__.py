"""Three sizes of one small model, trained here on two tasks whose answers are known to be right.

`python -m live.models` makes them for validating a serving system on a machine without a GPU: real
answers, longer steps and better answers the larger the model is. They are ordinary folders of
transformers; beside them lie the tasks, as lm-evaluation-harness and a load generator read them.
"""
