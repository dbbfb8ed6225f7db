"""The types of our links. Their names are part of saved workflows and must never change."""

from comfy_api.latest import io

Bank = io.Custom("CONCEPT_BANK")  # core.bank.ConceptBank, or None for a new bank
Regions = io.Custom("CONCEPT_REGIONS")  # list of core.regional.Region
Selection = io.Custom("NEURON_SELECTION")  # core.neurons.NeuronSelection
Photos = io.Custom("CONCEPT_PHOTOS")  # dict: concept's name -> list of pictures [3, H, W] in -1..1
Settings = io.Custom("CONCEPT_SETTINGS")  # dict: setting name -> value, of a method or of training

# the menu: six nodes of every day in the category itself, the others in its folders
EVERYDAY = "continual concepts"
REGIONS = "continual concepts/regions"
BANKS = "continual concepts/banks"
EVALUATION = "continual concepts/evaluation"
ADVANCED = "continual concepts/advanced"
