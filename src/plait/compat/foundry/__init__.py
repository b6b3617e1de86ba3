"""Model Foundry: replace the import root ``model_foundry`` by ``plait.compat.foundry``.

architectures       BaseLanguageModel, ModelOutput, register_architecture, create_model_from_config, the six models
config              ExperimentConfig, ModelConfig, MambaModelConfig and the other sections
data_collators      CausalLMDataCollator, MaskedLMDataCollator, get_data_collator
trainer             Trainer: Plait's one trainer
logging_utils       setup_logging
configs             test_mamba_tiny.yaml, mamba_medium.yaml
cli                 the verbs of ``model-foundry``: python -m plait.compat.foundry.cli run CONFIG

Its YAML files are configs like any other: ``plait train CONFIG.yaml``. Its checkpoints: ``plait convert``.
"""
