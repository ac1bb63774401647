"""What the icons show: concepts that a person names at a glance, and what the icon sets call them.

A set's icon belongs to a concept if its name, without the words that tell only how it is drawn (`-filled`, `-24`,
`baseline-`), is one of the concept's names. So `camera-off` and `home-plus` belong to none.
"""

from __future__ import annotations

import re

CONCEPTS: dict[str, tuple[str, ...]] = {
    "airplane": ("airplane", "plane", "aeroplane", "airplanemode-active", "airplane-mode", "airplane-mode-on"),
    "anchor": ("anchor",),
    "backpack": ("backpack",),
    "basketball": (
        "basketball",
        "basketball-ball",
        "ball-basketball",
        "sports-basketball",
    ),
    "battery": ("battery", "battery-full", "battery-max"),
    "bed": (
        "bed",
        "bed-double",
        "bed-single",
        "single-bed",
    ),
    "beer": ("beer", "beer-mug", "beer-stein", "mug-beer", "glass-mug", "sports-bar"),
    "bell": (
        "bell",
        "bell-alt",
    ),
    "bicycle": (
        "bicycle",
        "bike",
        "pedal-bike",
        "bicycle-alt",
    ),
    "book": (
        "book",
        "book-closed",
        "book-alt",
        "book-2",
        "book-4",
    ),
    "bookmark": ("bookmark", "bookmark-simple"),
    "brain": ("brain",),
    "briefcase": ("briefcase", "work", "toolcase", "case", "briefcase-alt"),
    "bug": ("bug", "bug-report", "bug-droid", "ladybug", "lady-beetle", "bug-ant", "beetle"),
    "bus": ("bus", "directions-bus", "bus-front", "vehicle-bus"),
    "cake": ("cake", "birthday-cake", "cake-slice"),
    "calculator": ("calculator", "calculate", "calculator-simple"),
    "calendar": ("calendar", "calendar-blank", "calendar-today", "calendar-empty", "calendar-alt", "event"),
    "camera": ("camera", "photo-camera", "camera-alt", "camera-photo", "camera-enhance"),
    "car": ("car", "car-side", "automobile", "directions-car", "vehicle-car", "car-sport", "drive-eta", "car-profile"),
    "clock": (
        "clock",
        "time",
        "clock-circle",
        "access-time",
        "clock-hour-4",
        "time-five",
    ),
    "cloud": (
        "cloud",
        "cloud-queue",
    ),
    "coffee": (
        "coffee",
        "cup",
        "mug",
        "mug-hot",
        "cafe",
        "local-cafe",
        "coffee-togo",
        "drink-coffee",
        "hot-drink",
        "cup-hot",
        "mug-saucer",
    ),
    "compass": (
        "compass",
        "compass-northwest",
        "compass-3",
    ),
    "cookie": ("cookie", "cookies"),
    "crown": ("crown", "crown-simple", "queen-crown", "chess-queen-crown"),
    "dice": ("dice", "dice-5", "dice-five", "casino", "die", "dice-6", "dice-3"),
    "drop": (
        "drop",
        "droplet",
        "water-drop",
        "drop-simple",
        "raindrop",
    ),
    "envelope": (
        "envelope",
        "mail",
        "email",
        "envelope-simple",
    ),
    "eye": (
        "eye",
        "visibility",
        "eye-open",
        "remove-red-eye",
    ),
    "fire": ("fire", "flame", "local-fire-department", "whatshot", "mode-heat"),
    "fish": ("fish", "fish-simple", "set-meal-fish"),
    "flag": ("flag", "flag-simple", "flag-alt", "flag-banner"),
    "flask": (
        "flask",
        "beaker",
        "science",
        "erlenmeyer-flask",
        "flask-vial",
    ),
    "flower": (
        "flower",
        "flower-tulip",
        "local-florist",
        "tulip",
        "flowers",
    ),
    "folder": ("folder", "folder-simple"),
    "game controller": (
        "gamepad",
        "game-controller",
        "controller",
        "sports-esports",
        "videogame-asset",
        "xbox-controller",
        "device-gamepad",
        "game-handle",
    ),
    "gear": (
        "gear",
        "cog",
        "settings",
        "setting",
        "gear-six",
        "cog-six-tooth",
    ),
    "ghost": ("ghost",),
    "gift": ("gift", "present", "card-giftcard", "redeem", "gift-box", "featured-seasonal-and-gifts"),
    "glasses": (
        "glasses",
        "eyeglasses",
        "eyeglass",
        "sunglasses",
    ),
    "globe": (
        "globe",
        "world",
        "earth",
        "globe-alt",
    ),
    "hamburger": ("hamburger", "burger", "lunch-dining", "food-hamburger"),
    "hammer": ("hammer", "hammer-simple", "build-hammer"),
    "hand": ("hand", "hand-palm", "back-hand", "hand-paper", "palm", "hand-stop", "stop-hand", "pan-tool"),
    "headphones": ("headphones", "headphone"),
    "heart": (
        "heart",
        "heart-straight",
        "favourite",
    ),
    "hourglass": (
        "hourglass",
        "hourglass-half",
        "sand-clock",
        "hourglass-empty",
        "hourglass-full",
        "hourglass-end",
        "hourglass-start",
        "hourglass-medium",
        "sandglass",
    ),
    "house": ("house", "home", "cottage", "home-simple", "home-alt", "house-simple"),
    "ice cream": ("ice-cream", "icecream", "ice-cream-cone"),
    "key": ("key", "vpn-key", "key-vertical"),
    "laptop": ("laptop", "computer-laptop", "laptop-mac", "notebook-computer", "laptop-simple", "laptop-computer"),
    "leaf": (
        "leaf",
        "leaf-simple",
    ),
    "light bulb": ("lightbulb", "bulb", "light-bulb", "idea", "lightbulb-simple", "lightbulb-on"),
    "lightning": (
        "lightning",
        "bolt",
        "flash",
        "zap",
        "thunderbolt",
        "lightning-bolt",
        "flash-on",
    ),
    "lock": ("lock", "lock-closed", "padlock", "locked", "https", "lock-simple", "lock-alt"),
    "magnet": ("magnet", "magnet-straight"),
    "magnifying glass": ("search", "magnifying-glass", "magnify", "magnifier", "magnifying", "search-alt"),
    "map": ("map", "map-trifold", "map-simple"),
    "map pin": (
        "map-pin",
        "map-marker",
        "location-on",
        "location-pin",
        "location-dot",
        "location-marker",
        "fmd-good",
        "pin-alt",
        "map-marker-alt",
    ),
    "medal": (
        "medal",
        "medal-military",
        "military-tech",
    ),
    "megaphone": ("megaphone", "bullhorn", "campaign", "megaphone-simple", "megaphone-loud", "speakerphone"),
    "microphone": (
        "microphone",
        "mic",
        "microphone-alt",
        "keyboard-voice",
    ),
    "microscope": ("microscope", "biotech"),
    "moon": ("moon", "dark-mode", "bedtime", "weather-moon", "night", "moon-clear", "nightlight"),
    "music note": ("music-note", "music", "musical-note", "audiotrack", "music-note-simple", "music-note-single"),
    "palette": (
        "palette",
        "color-palette",
        "color-lens",
    ),
    "paper plane": ("paper-plane", "send", "paper-plane-tilt", "paper-airplane"),
    "paperclip": (
        "paperclip",
        "attachment",
        "attach",
        "attach-file",
        "paper-clip",
        "link-attachment",
    ),
    "paw": ("paw", "pets", "paw-print", "animal-paw-print"),
    "pencil": (
        "pencil",
        "pencil-simple",
        "pencil-alt",
        "lead-pencil",
    ),
    "person": (
        "person",
        "user",
        "people-single",
    ),
    "phone": (
        "phone",
        "telephone",
        "phone-simple",
        "phone-handset",
        "phone-call-simple",
        "phone-alt",
    ),
    "pizza": ("pizza", "pizza-slice", "local-pizza", "food-pizza"),
    "planet": ("planet", "saturn", "planet-ringed"),
    "plug": (
        "plug",
        "power-plug",
        "power-socket-plug",
        "plug-connected",
    ),
    "printer": ("printer", "print"),
    "puzzle piece": ("puzzle", "puzzle-piece", "extension", "jigsaw"),
    "robot": ("robot", "bot", "smart-toy", "robot-face"),
    "rocket": ("rocket", "rocket-launch"),
    "ruler": ("ruler", "straighten"),
    "boat": ("ship", "sailboat", "sailing", "sail-boat", "boat"),
    "scissors": ("scissors", "cut", "content-cut", "scissor"),
    "shield": (
        "shield",
        "shield-simple",
        "shield-alt",
    ),
    "shirt": ("shirt", "t-shirt", "tshirt", "tshirt-crew", "shirt-t", "tee-shirt"),
    "shopping bag": (
        "shopping-bag",
        "local-mall",
        "bag-simple",
        "shopping-bag-alt",
    ),
    "shopping cart": ("shopping-cart", "cart", "cart-shopping", "shopping-cart-simple", "cart-simple"),
    "skull": ("skull",),
    "smiley": (
        "smile",
        "smiley",
        "happy",
        "emoji-smile",
        "face-smile",
        "emotion-happy",
        "smiling-face",
        "emoticon-happy",
        "smile-face",
        "face-smiling",
        "sentiment-satisfied",
        "slightly-smiling",
    ),
    "snowflake": (
        "snowflake",
        "ac-unit",
        "weather-snowflake",
    ),
    "star": (
        "star",
        "star-rate",
    ),
    "sun": ("sun", "sunny", "light-mode", "wb-sunny", "weather-sunny", "sun-dim"),
    "target": (
        "target",
        "bullseye",
        "bullseye-arrow",
        "target-arrow",
        "aim",
    ),
    "tent": ("tent", "camping", "holiday-village-tent"),
    "thermometer": (
        "thermometer",
        "temperature-half",
        "thermometer-simple",
    ),
    "thumbs up": ("thumbs-up", "thumb-up", "like-thumb", "hand-thumbs-up", "thumb-up-alt"),
    "ticket": ("ticket", "confirmation-number", "ticket-simple"),
    "train": (
        "train",
        "subway",
        "tram",
        "train-simple",
        "vehicle-subway",
        "directions-subway",
    ),
    "trash can": (
        "trash",
        "trash-can",
        "trash-bin",
        "bin",
        "trash-simple",
        "trash-alt",
        "dustbin",
        "waste",
    ),
    "tree": (
        "tree",
        "tree-deciduous",
        "tree-evergreen",
        "pine-tree",
        "forest-tree",
        "tree-pine",
        "tree-alt",
        "evergreen",
    ),
    "trophy": ("trophy", "emoji-events", "cup-trophy", "award-trophy", "champion", "trophy-cup"),
    "truck": (
        "truck",
        "local-shipping",
        "delivery-truck",
        "truck-simple",
        "lorry",
    ),
    "tv": ("tv", "television", "television-simple", "tv-retro", "television-classic", "tv-alt"),
    "umbrella": (
        "umbrella",
        "umbrella-simple",
    ),
    "video camera": ("video-camera", "video", "videocam", "camcorder", "camera-video", "videocamera"),
    "wallet": ("wallet", "account-balance-wallet"),
    "watch": (
        "watch",
        "watch-simple",
    ),
    "wifi": ("wifi", "wi-fi", "wifi-high", "network-wifi", "signal-wifi"),
    "wine glass": (
        "wine",
        "wine-glass",
        "glass-wine",
        "wine-bar",
        "drink-wine",
        "goblet",
    ),
    "wrench": (
        "wrench",
        "spanner",
        "tool",
        "wrench-simple",
    ),
}

_HOW_DRAWN = re.compile(
    r"(-+(fill|filled|outline|outlined|rounded|sharp|solid|bold|light|regular|line|linear|stroke|baseline|round"
    r"|o|\d+))+$"
)
_PREFIXES = re.compile(r"^(outline|baseline|round|sharp)-")
_LEFT_OUT = re.compile(r"duotone|twotone|two-tone|-thin|-color$")  # grey areas and hairlines are neither style
_NAMES = {name: concept for concept, names in CONCEPTS.items() for name in names}


def plain_name(icon: str) -> str | None:
    """`outline-home-24` -> `home`; None for drawings in several tones or in hairlines."""
    if _LEFT_OUT.search(icon):
        return None
    return _PREFIXES.sub("", _HOW_DRAWN.sub("", icon))


def concept_of(name: str) -> str | None:
    """The concept that a plain name stands for, if any."""
    return _NAMES.get(name)


def is_compound(name: str) -> bool:
    """Whether a plain name begins with a concept's name and goes on (`camera-off`): such drawings teach the
    autoencoder more shapes, without the logos that icon sets are full of."""
    words = name.split("-")
    return any("-".join(words[:count]) in _NAMES for count in range(1, len(words)))


def named_style(icon: str) -> str | None:
    """`solid` or `outline` where the icon's name says so."""
    if re.search(r"(^|-)(fill|filled|solid)(-|$)", icon):
        return "solid"
    return "outline" if re.search(r"(^|-)(outline|outlined|line|light|regular)(-|$)", icon) else None
