"""What `train.py` needs and a library user does not: models, data, the LightningModule and the run's housekeeping."""
