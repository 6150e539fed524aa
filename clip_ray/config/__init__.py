"""Configuration: the schema, the named architectures, and loading from YAML and flags."""

from clip_ray.config.schema import (
    CheckpointConfig,
    ClusterConfig,
    Config,
    DataConfig,
    EvalConfig,
    InitConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    S3Options,
    SourceConfig,
    TextConfig,
    TokenizerConfig,
    TrackingConfig,
    TrainConfig,
    VisionConfig,
)

__all__ = [
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "InitConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "S3Options",
    "SourceConfig",
    "TextConfig",
    "TokenizerConfig",
    "TrackingConfig",
    "TrainConfig",
    "VisionConfig",
]
