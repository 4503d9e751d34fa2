"""``kvlode plan``: what a store would take, cost and gain, from stated formulas, before anything is bought or started."""
