"""What cli.check_loss examines: a registered loss on random groups and answers.

A check takes the name of a loss and returns a finding, one line of text. It raises LossError, one line, for what
cannot be trained on.
"""
