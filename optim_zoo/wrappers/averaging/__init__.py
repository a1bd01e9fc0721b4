"""Averages of the parameters over the steps, which are kept in the state of the optimizer.

The average of the last parameters often has a lower loss than the parameters themselves, whose
noise grows with the learning rate. `average_parameters` keeps an exponential moving average,
`average_uniformly` the mean of all parameters from one step on. `read` returns the average::

    tx = averaging.average_parameters(lamb(1e-3), decay=0.999)
    ...
    loss = evaluate(averaging.read(state, like=params))
"""

from optim_zoo.wrappers.averaging.keeping import average_parameters, average_uniformly
from optim_zoo.wrappers.averaging.reading import read
from optim_zoo.wrappers.averaging.state import AverageParametersState

__all__ = ["AverageParametersState", "average_parameters", "average_uniformly", "read"]
