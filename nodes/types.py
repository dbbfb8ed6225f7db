"""The types on our wires. The names are part of people's saved workflows: they never change."""

from comfy_api.latest import io

Bank = io.Custom("CONCEPT_BANK")  # core.bank.ConceptBank, or None for a bank that is still to be begun
Regions = io.Custom("CONCEPT_REGIONS")  # list of core.regional.Region
Selection = io.Custom("NEURON_SELECTION")  # core.neurons.NeuronSelection
Photos = io.Custom("CONCEPT_PHOTOS")  # dict: concept's name -> list of pictures [3, H, W] in -1..1
Settings = io.Custom("CONCEPT_SETTINGS")  # dict: setting name -> value, of a method or of training

LEARNING = "continual concepts"
USING = "continual concepts/use"
BANKS = "continual concepts/bank"
EXTRAS = "continual concepts/extras"
