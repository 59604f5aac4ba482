"""What trains the network: the LightningModule, its optimizers and schedules."""
