"""The family: methods cited beside QuZO, AdaZeta, LoRETTA and MeZO, a page each, on top of zo_optim's parts."""
