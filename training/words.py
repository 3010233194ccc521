"""The words that the training data is about; few, so that each is seen often."""

NAMES = "Anna Ben Carla David Emma Felix Greta Hugo Ida Jonas Karin Leo Mara Nils Olga Paul".split()
CITIES = "Paris London Berlin Madrid Rome Vienna Oslo Dublin Prague Lisbon Athens Cairo Tokyo Lima Delhi Boston".split()
COLOURS = "red blue green yellow black white".split()
ANIMALS = "cat dog horse bird fish mouse".split()
FRUIT = "apples pears plums grapes lemons oranges".split()
JOBS = "baker pilot doctor teacher farmer painter".split()
LANGUAGES = "German French Spanish Italian".split()
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
THINGS = (
    "apple pear plum tree stone river cloud house chair table lamp book pen cup spoon knife door window garden flower "
    "rain snow wind fire sand road boat train car sun moon star bread milk tea cat dog horse bird fish"
).split()
