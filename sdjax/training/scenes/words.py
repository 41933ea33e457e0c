"""The words that the world's captions are made of; what each says is read back by `asked`."""

NOUNS = {
    "house": (("house", "houses"), ("cottage", "cottages"), ("house", "houses")),
    "tree": (("tree", "trees"),),
    "tower": (("tower", "towers"), ("tower", "towers"), ("castle tower", "castle towers")),
    "tent": (("tent", "tents"),),
    "car": (("car", "cars"),),
    "boat": (("boat", "boats"), ("sailboat", "sailboats"), ("sailing boat", "sailing boats")),
    "balloon": (("balloon", "balloons"), ("hot air balloon", "hot air balloons")),
    "kite": (("kite", "kites"),),
}
NUMBERS = {
    1: ("a", "a", "a", "a", "one", "a single", "a little"),
    2: ("two", "two", "two", "two", "a pair of", "2", "two little"),
    3: ("three", "three", "three", "three", "3", "three little"),
}
PLACES = {
    "left": ("on the left", "on the left", "to the left", "on the left side", "at left"),
    "middle": ("in the middle", "in the middle", "in the centre", "in the center"),
    "right": ("on the right", "on the right", "to the right", "on the right side", "at right"),
}
# What a picture is of, where its objects stand, and what is behind them.
TERRAINS = {
    "hills": {
        "is": ("rolling hills", "green hills", "a hilly landscape", "hills"),
        "at": ("in the hills", "among rolling hills", "in hilly country"),
        "under": ("above the hills", "over rolling hills"),
    },
    "mountains": {
        "is": ("mountains", "snowy mountains", "a mountain landscape", "high mountains"),
        "at": ("in the mountains", "in front of mountains", "below snowy mountains"),
        "under": ("above snowy mountains", "over the mountains", "above mountains"),
    },
    "forest": {
        "is": ("a forest", "a pine forest", "the woods"),
        "at": ("in front of a forest", "by the forest", "near the woods"),
        "under": ("above the forest", "over a pine forest"),
    },
    "desert": {
        "is": ("a desert", "sand dunes", "the desert"),
        "at": ("in the desert", "among sand dunes", "in a desert"),
        "under": ("above the desert", "over desert dunes"),
    },
    "city": {
        "is": ("a city", "a city skyline", "the city"),
        "at": ("near the city", "in front of a city", "in front of the skyline"),
        "under": ("above the city", "over a city"),
    },
}
WATERS = {
    "sea": {
        "is": ("the sea", "a sea", "the ocean"),
        "at": ("by the sea", "on the beach", "at the seaside", "near the ocean", "by the sea"),
        "on": ("on the sea", "at sea", "sailing on the sea", "on the ocean"),
    },
    "lake": {
        "is": ("a lake", "the lake"),
        "at": ("by a lake", "near a lake", "at the lake", "beside a lake"),
        "on": ("on a lake", "on the lake", "sailing on a lake"),
    },
    "river": {
        "is": ("a river", "a winding river"),
        "at": ("by a river", "near a river", "beside a winding river"),
        "on": ("on a river",),
    },
}
TIMES = {
    "dawn": ("at dawn", "at dawn", "at sunrise", "in the early morning"),
    "day": ("by day", "in daylight", "at noon", "during the day", "in the daytime"),
    "sunset": ("at sunset", "at sunset", "at dusk", "in the evening"),
    "night": ("at night", "at night", "at night", "by night", "at midnight"),
}
TIME_NOUNS = {
    "dawn": ("dawn", "morning"),
    "day": ("day",),
    "sunset": ("sunset", "evening"),
    "night": ("night",),
}
WEATHERS = {
    "clear": ("under a clear sky", "in clear weather", "under a cloudless sky"),
    "cloudy": ("under a cloudy sky", "with clouds", "in cloudy weather", "under white clouds"),
    "rain": ("in the rain", "in rain", "in rainy weather", "while it rains"),
    "snow": ("in the snow", "in falling snow", "in snowy weather", "while it snows"),
    "fog": ("in the fog", "in fog", "in foggy weather", "in the mist"),
}
WEATHER_ADJECTIVES = {
    "clear": ("clear",),
    "cloudy": ("cloudy",),
    "rain": ("rainy",),
    "snow": ("snowy",),
    "fog": ("foggy", "misty"),
}
STARS = ("under a starry sky", "under the stars")
SKIES = {
    "sun": ("under the sun", "with the sun in the sky", "with the sun"),
    "moon": ("under the moon", "with the moon in the sky", "in moonlight", "with a moon"),
    "rainbow": ("under a rainbow", "with a rainbow", "and a rainbow"),
    "aurora": ("under the aurora", "under northern lights", "with the northern lights"),
}
TAGS = {"sun": "sun", "moon": "moon", "rainbow": "rainbow", "aurora": "aurora"}
OPENINGS = ("a picture of", "a painting of", "an image of", "a scene with")

# One word of a prompt, and what it asks for; more than captions say.
MEANINGS: dict[str, tuple[tuple[str, str], ...]] = {
    word: ((attribute, value),)
    for attribute, values in {
        "time": {
            "dawn": "dawn sunrise morning daybreak",
            "day": "day daytime daylight noon midday afternoon",
            "sunset": "sunset dusk evening twilight sundown",
            "night": "night midnight nighttime",
        },
        "weather": {
            "clear": "clear cloudless",
            "cloudy": "cloudy cloud clouds overcast",
            "rain": "rain rains rainy raining rainfall",
            "snow": "snow snows snowy snowing snowfall",
            "fog": "fog foggy mist misty",
        },
        "terrain": {
            "hills": "hill hills hilly",
            "mountains": "mountain mountains mountainous peaks",
            "forest": "forest forests woods",
            "desert": "desert dunes dune",
            "city": "city skyline town downtown",
        },
        "water": {
            "sea": "sea ocean beach coast shore seaside",
            "lake": "lake lakeside pond",
            "river": "river riverside stream",
        },
        "sky": {
            "sun": "sun",
            "moon": "moon moonlight moonlit",
            "rainbow": "rainbow",
            "aurora": "aurora",
        },
    }.items()
    for value, words in values.items()
    for word in words.split()
} | {
    "sunny": (("weather", "clear"), ("sky", "sun")),
    "starry": (("time", "night"), ("weather", "clear")),
    "stars": (("time", "night"), ("weather", "clear")),
}
