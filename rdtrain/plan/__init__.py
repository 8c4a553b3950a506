"""`rdtrain plan`: what a run would need and cost on any number of GPUs, before there is one."""
