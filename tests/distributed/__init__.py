"""Training by several processes: the same losses and weights as in one, whatever the batches of the processes hold."""
