class ActionTuple:
    def __init__(self, continuous=None, discrete=None):
        self.continuous, self.discrete = continuous, discrete
