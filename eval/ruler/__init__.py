"""RULER (Hsieh et al. 2024): thirteen long-context tasks, built for any tokenizer and any length.

`templates` words the prompts, `needles`, `chains`, `counting` and `questions` make the samples,
`fit` brings them to length, `compat` makes them as NVIDIA's scripts do, `samples` keeps them in
files, `scoring` judges outputs, `runner` asks the model, `results` and `report` sum it all up, and
`training` writes documents for training small models on the same prompts.
"""
