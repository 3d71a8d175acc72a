"""How weights move: optimizers, their parameter groups, learning-rate schedules, the average of the weights."""
