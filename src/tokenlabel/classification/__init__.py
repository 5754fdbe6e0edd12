"""The task of training a classifier with token labels, and its dry run."""
