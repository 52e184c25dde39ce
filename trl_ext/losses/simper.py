import torch


def simper_loss(chosen_mean_logps, rejected_mean_logps):
    return -torch.exp(chosen_mean_logps) + torch.exp(rejected_mean_logps)
