"""RULER (Hsieh et al. 2024): thirteen long-context tasks, built for any tokenizer and any length.

`specs` lists the tasks and `templates` words the prompts; `needles`, `chains`, `counting` and
`questions` plan samples, `fit` brings them to length, `compat` makes them as NVIDIA's scripts do,
`samples` keeps them in files. `runner` asks the model, `scoring` judges its outputs, `results` and
`report` sum it all up. `training` writes documents for training small models on the same prompts.
"""
