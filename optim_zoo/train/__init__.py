"""The main job: pretraining from a config file to a run folder. Needs the extra ``train``."""
