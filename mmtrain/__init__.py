"""mmtrain: training of models that read and write text and images in one sequence."""

__version__ = "0.1.0"
