"""`rdtrain compare`: runs side by side, those that exist or those that an experiment file asks for."""
