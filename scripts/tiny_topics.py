# ruff: noqa: E501 - the tables are one line a topic
"""The little encyclopaedia behind the tiny model: topics, what is known about each, and how answers are worded.

Every category has a table (one line a topic, columns separated by ``|``) and templates over its columns. ``{x}`` is the
topic, a column's name is its value, and a capital first letter of either (``{X}``, ``{Home}``) capitalises the value.
The same facts are worded by several question types, so that a question type never asked about a topic still has one
right answer.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ListAnswer:
    """A numbered list: every item forks.

    ``wants`` are noun phrases with ``{n}`` (a number word) and ``{x}``; ``items`` are (title, detail) templates in order.
    """

    wants: tuple[str, ...]
    intro: str
    items: tuple[tuple[str, str], ...]
    default: int
    ending: str = ""


@dataclass(frozen=True, slots=True)
class ProseAnswer:
    """Paragraphs: the first sentence of each stays on the main path, the rest is its detail."""

    wants: tuple[str, ...]
    paragraphs: tuple[tuple[str, str], ...]
    ending: str = ""


@dataclass(frozen=True, slots=True)
class PlainAnswer:
    """A short answer that must not fork. ``wants`` are noun phrases, ``questions`` are full questions."""

    wants: tuple[str, ...]
    questions: tuple[str, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Category:
    """Topics of one kind with all their question types."""

    name: str
    columns: tuple[str, ...]
    table: str
    lists: dict[str, ListAnswer]
    prose: dict[str, ProseAnswer]
    plain: dict[str, PlainAnswer]
    sentence: str
    poem: tuple[str, ...]
    compare: tuple[tuple[str, str], ...]
    check: tuple[str, str, str, str]  # (column, question with {value}, answer if so, answer if not)

    def topics(self) -> list[dict[str, str]]:
        """The table as one dict a topic; the first column is ``x``."""
        rows = [[cell.strip() for cell in line.split("|")] for line in self.table.strip().splitlines()]
        return [dict(zip(("x", *self.columns), row, strict=True)) for row in rows]


ANIMALS = Category(
    name="animals",
    columns=("kind", "home", "food", "body", "skill", "group", "young", "danger"),
    table="""
elephants | large mammals | grasslands of Africa and Asia | grass and bark | a long trunk | remember places for years | in herds | calves | hunting for ivory
penguins | sea birds | icy coasts of the south | fish and krill | a black and white coat | dive very deep | in huge colonies | chicks | melting sea ice
lions | big cats | savannas of Africa | zebras and antelopes | a golden mane | hunt as a team | in prides | cubs | loss of land to farms
wolves | wild dogs | forests of the north | deer and moose | thick grey fur | run for hours | in packs | pups | conflict with farmers
honeybees | insects | meadows and gardens | nectar and pollen | two pairs of wings | dance to show the way | in hives | larvae | poison on the fields
dolphins | sea mammals | warm seas | fish and squid | a smooth grey body | find things by sound | in pods | calves | fishing nets
owls | night birds | woods and old barns | mice and voles | large round eyes | fly without a sound | alone or in pairs | owlets | loss of old trees
frogs | amphibians | ponds and wet meadows | flies and worms | long back legs | breathe through the skin | near the water | tadpoles | dry summers
sea turtles | reptiles | tropical oceans | sea grass and jellyfish | a hard flat shell | find the beach of their birth | alone in the sea | hatchlings | plastic in the sea
kangaroos | pouched mammals | dry plains of Australia | grass and leaves | a strong tail | jump over high fences | in mobs | joeys | traffic on the roads
bats | flying mammals | caves and attics | moths and mosquitoes | wings of thin skin | hunt in the dark | in roosts | pups | loss of quiet caves
camels | hoofed mammals | deserts of Asia and Africa | thorny plants | a hump full of fat | go for days without water | in caravans | calves | sickness in the herd
octopuses | molluscs | rocky sea floors | crabs and shells | eight soft arms | change their colour | alone in dens | hatchlings | warming seas
squirrels | rodents | parks and forests | nuts and seeds | a bushy tail | climb down head first | alone in tree nests | kittens | cars and cats
""",
    lists={
        "facts": ListAnswer(
            wants=(
                "{n} facts about {x}",
                "{n} interesting facts about {x}",
                "{n} things to know about {x}",
                "{n} things I should know about {x}",
            ),
            intro="Here are {n} facts about {x}:",
            items=(
                ("Habitat", "{X} live in the {home}. There they find enough {food} to feed on."),
                ("Diet", "{X} eat mostly {food}. They look for this food in the {home}."),
                ("Body", "{X} are known for {body}. It helps them in their life in the {home}."),
                ("Skill", "{X} can {skill}. Few other {kind} can do this as well as they can."),
                ("Social life", "{X} usually live {group}. This is how they keep their {young} safe."),
                ("Young", "The young of {x} are called {young}. They soon learn where to find {food}."),
                ("Danger", "The greatest danger for {x} is {danger}. It can be felt all over the {home}."),
                ("Family", "{X} belong to the {kind}. You can tell them from the others by {body}."),
            ),
            default=4,
        ),
        "watching": ListAnswer(
            wants=(
                "{n} tips for watching {x}",
                "{n} tips on how to watch {x}",
                "{n} pieces of advice for watching {x}",
            ),
            intro="Here are {n} tips for watching {x}:",
            items=(
                ("Place", "Go to the {home}. This is where you have the best chance to see {x}."),
                ("Food", "Look for {food}. Where there is food, {x} are never far away."),
                (
                    "Distance",
                    "Stay far away from {x} and use binoculars. This is most important when there are {young}.",
                ),
                ("Signs", "Look out for {body}. It is the easiest way to recognise {x}."),
                ("Patience", "Wait quietly and do not give up. With some luck you will see how {x} {skill}."),
                ("Company", "{X} usually live {group}. So look around carefully when you have found the first one."),
            ),
            default=4,
            ending="With these tips you will enjoy watching {x}.",
        ),
    },
    prose={
        "overview": ProseAnswer(
            wants=("{x}", "the life of {x}"),
            paragraphs=(
                ("{X} are {kind} from the {home}.", "They are easy to recognise by {body}. They can {skill}."),
                ("Food shapes the daily life of {x}.", "They eat mostly {food} and usually live {group}."),
                (
                    "Today {x} need our help.",
                    "The greatest danger for them is {danger}. Their {young} need a safe place.",
                ),
            ),
        ),
    },
    plain={
        "home": PlainAnswer(
            ("the home of {x}", "the habitat of {x}"),
            ("Where do {x} live?", "Where can I find {x}?"),
            "{X} live in the {home}.",
        ),
        "food": PlainAnswer(
            ("the food of {x}", "the main food of {x}"),
            ("What do {x} eat?", "What do {x} feed on?"),
            "{X} eat mostly {food}.",
        ),
        "young": PlainAnswer(
            ("the name for the young of {x}", "the word for the young of {x}"),
            ("What are the young of {x} called?", "What do you call the young of {x}?"),
            "The young of {x} are called {young}.",
        ),
    },
    sentence="{X} are {kind} that live in the {home} and eat mostly {food}.",
    poem=(
        "In the {home} we see",
        "{x}, living wild and free.",
        "With {body}, day by day,",
        "they find {food} on their way.",
    ),
    compare=(
        ("home", "{X} live in the {home}"),
        ("food", "{X} eat mostly {food}"),
        ("group", "{X} usually live {group}"),
    ),
    check=("kind", "Are {x} {value}?", "Yes, {x} are {kind}.", "No, {x} are {kind}."),
)

FOODS = Category(
    name="foods",
    columns=("kind", "taste", "nutrient", "effect", "dish", "partner", "method", "place", "origin"),
    table="""
apples | fruits | sweet and fresh | fibre | good digestion | apple pie | cinnamon | bake them with honey | in a cool cellar | Central Asia
bananas | fruits | soft and sweet | potassium | strong muscles | banana bread | peanut butter | mash them with a fork | at room temperature | Southeast Asia
carrots | vegetables | mild and sweet | vitamin A | good eyes | carrot cake | ginger | roast them in the oven | in damp sand | Persia
potatoes | vegetables | mild and earthy | starch | lasting energy | potato soup | butter | boil them in salted water | in a dark cellar | the Andes
tomatoes | vegetables | sweet and sour | lycopene | a healthy heart | tomato sauce | basil | chop them for a salad | on a plate in the kitchen | South America
mushrooms | fungi | savoury | copper | strong blood | mushroom risotto | garlic | fry them in a hot pan | in a paper bag | forests of the north
lentils | legumes | nutty | protein | growing muscles | lentil curry | cumin | simmer them for half an hour | in a sealed jar | the Near East
oats | grains | mild and creamy | soluble fibre | low cholesterol | porridge | berries | soak them in milk | in a dry cupboard | Northern Europe
walnuts | nuts | rich and bitter | omega fats | a clear mind | walnut pesto | blue cheese | toast them in a dry pan | in the freezer | Central Asia
eggs | animal foods | rich and mild | complete protein | body repair | omelettes | chives | scramble them gently | in the refrigerator | old farmyards
lemons | fruits | very sour | vitamin C | strong defences | lemon tart | fish | press them for juice | in a bowl of water | northern India
onions | vegetables | sharp and hot | sulphur compounds | calm blood vessels | onion soup | thyme | brown them slowly | in a hanging net | Central Asia
strawberries | fruits | sweet and juicy | folic acid | new blood cells | strawberry jam | cream | slice them with sugar | on a dry kitchen towel | French gardens
chickpeas | legumes | nutty and mild | iron | transport of oxygen | hummus | sesame paste | blend them with lemon | in a tin | Turkey
""",
    lists={
        "facts": ListAnswer(
            wants=(
                "{n} facts about {x}",
                "{n} interesting facts about {x}",
                "{n} things to know about {x}",
                "{n} things I should know about {x}",
            ),
            intro="Here are {n} facts about {x}:",
            items=(
                ("Taste", "{X} have a taste that is {taste}. This is why they go so well with {partner}."),
                ("Nutrition", "{X} are a good source of {nutrient}. This is important for {effect}."),
                ("Cooking", "{X} are often used for {dish}. The simplest way to prepare them is to {method}."),
                ("Storage", "It is best to keep {x} {place}. There they stay good for a long time."),
                ("Origin", "{X} first came from {origin}. Today people enjoy them all over the world."),
                ("Partners", "{X} are at their best together with {partner}. Many cooks love this pair."),
                ("Family", "{X} belong to the {kind}. In the kitchen they are loved for {dish}."),
            ),
            default=4,
            ending="As you can see, {x} are worth a place in every kitchen.",
        ),
        "benefits": ListAnswer(
            wants=(
                "{n} benefits of {x}",
                "{n} reasons to eat {x}",
                "{n} good reasons for eating {x}",
                "{n} advantages of eating {x}",
            ),
            intro="Here are {n} reasons to eat {x}:",
            items=(
                ("Health", "{X} contain a lot of {nutrient}. Your body needs it for {effect}."),
                ("Flavour", "The taste of {x} is {taste}. You can bring it out with {partner}."),
                ("Easy cooking", "You do not need much time. You can simply {method} and serve them with {partner}."),
                ("Variety", "There are many dishes with {x}. The best known of them is {dish}."),
                ("Good keeping", "You can keep {x} {place}. So you always have something healthy at home."),
            ),
            default=4,
        ),
    },
    prose={
        "overview": ProseAnswer(
            wants=("{x}", "the use of {x} in the kitchen"),
            paragraphs=(
                (
                    "{X} are {kind} that first came from {origin}.",
                    "Their taste is {taste}. They go very well with {partner}.",
                ),
                (
                    "They are also good for your health.",
                    "{X} are a good source of {nutrient}, which is important for {effect}.",
                ),
                (
                    "In the kitchen you can use {x} in many ways.",
                    "They are often used for {dish}. You can also {method}.",
                ),
            ),
            ending="All in all, {x} are a good choice.",
        ),
    },
    plain={
        "origin": PlainAnswer(
            ("the origin of {x}", "the place where {x} come from"),
            ("Where do {x} come from?", "Where were {x} first grown or found?"),
            "{X} first came from {origin}.",
        ),
        "storage": PlainAnswer(
            ("the best place to keep {x}", "the right way to store {x}"),
            ("Where should I keep {x}?", "How should I store {x}?"),
            "It is best to keep {x} {place}.",
        ),
        "nutrient": PlainAnswer(
            ("the most important nutrient in {x}", "the main nutrient of {x}"),
            ("What do {x} contain?", "What are {x} a good source of?"),
            "{X} are a good source of {nutrient}.",
        ),
    },
    sentence="{X} are {kind} with a taste that is {taste}, and they are often used for {dish}.",
    poem=(
        "A bowl of {x} for me,",
        "from {origin} they came to be.",
        "They taste {taste}, that is true,",
        "with {partner} they are for you.",
    ),
    compare=(
        ("taste", "{X} have a taste that is {taste}"),
        ("nutrition", "{X} are a good source of {nutrient}"),
        ("cooking", "{X} are often used for {dish}"),
    ),
    check=("kind", "Are {x} {value}?", "Yes, {x} are {kind}.", "No, {x} are {kind}."),
)

SPORTS = Category(
    name="sports",
    columns=("place", "gear", "aim", "move", "body", "origin", "risk", "warm"),
    table="""
tennis | a marked court | a racket and a ball | win points over the net | the serve | arms and legs | France | a sore elbow | swinging the arms
football | a grass field | a ball and studded boots | score more goals | the pass | legs and lungs | England | a twisted ankle | jogging with the ball
basketball | an indoor court | a large orange ball | throw the ball into the basket | the jump shot | legs and hands | America | a sprained finger | light jumping
swimming | a pool | a swimsuit and goggles | reach the wall first | the crawl | shoulders and lungs | ancient Egypt | a stiff shoulder | circling the arms
cycling | quiet roads | a bicycle and a helmet | ride the distance in good time | smooth pedalling | thighs and heart | Paris | a fall on the road | riding in a low gear
judo | a soft mat | a white jacket with a belt | throw the other person | the hip throw | back and grip | Japan | a hard fall | rolling over the shoulder
chess boxing | a boxing ring | gloves and a chessboard | win by mate or knockout | the quick switch | fists and mind | Berlin | a blow to the head | shadow boxing
climbing | a steep wall | a rope and a harness | reach the top | the foot step | fingers and back | the Alps | worn finger joints | easy routes
rowing | a calm lake | a narrow boat and oars | cross the line first | the long stroke | back and thighs | the river Thames | a tired lower back | slow strokes
badminton | a small hall | a light racket and a shuttle | make the shuttle touch the floor | the smash | wrists and calves | India | a torn tendon | skipping with a rope
running | forest paths | good running shoes | finish the distance | the even stride | legs and heart | Greece | painful knees | walking fast
volleyball | a sandy beach | a soft white ball | drop the ball on the other side | the block | knees and shoulders | Massachusetts | a jammed thumb | passing in pairs
skiing | a snowy slope | two skis and poles | go down the hill safely | the parallel turn | hips and knees | Norway | a broken leg | squatting slowly
golf | a large green course | clubs and a small ball | use few strokes | the swing | hips and wrists | Scotland | a sore back | turning the hips
""",
    lists={
        "rules": ListAnswer(
            wants=("{n} basics of {x}", "{n} things a beginner should know about {x}", "{n} basic points about {x}"),
            intro="Here are {n} basics of {x}:",
            items=(
                ("Aim", "The aim of {x} is to {aim}. Everything else in the sport follows from this."),
                ("Place", "The usual place for {x} is {place}. Make sure that it is free and safe before you start."),
                ("Equipment", "For {x} you need {gear}. Beginners can borrow this from a club."),
                (
                    "Technique",
                    "The most important technique in {x} is {move}. Practise it slowly before you get faster.",
                ),
                ("Fitness", "{X} trains {body}. You will feel this after the first few weeks."),
                ("Origin", "{X} has its roots in {origin}. From there it spread to many other countries."),
            ),
            default=4,
        ),
        "tips": ListAnswer(
            wants=(
                "{n} tips for {x}",
                "{n} tips for getting better at {x}",
                "{n} ways to improve at {x}",
                "{n} ways to get better at {x}",
            ),
            intro="Here are {n} ways to get better at {x}:",
            items=(
                ("Warm up", "Begin every training with {warm}. It lowers the risk of {risk}."),
                ("Practise the technique", "Spend ten minutes a day on {move}. It is the heart of {x}."),
                ("Train your body", "{X} needs strong {body}. Train them twice a week at home."),
                ("Check your equipment", "Look after {gear}. Good equipment makes it easier to {aim}."),
                (
                    "Choose a good place",
                    "Go to {place} as often as you can. You learn most where the sport is really done.",
                ),
                ("Rest", "Take a day off after hard training. Without rest you may soon suffer from {risk}."),
                ("Find partners", "Join a club and train with others. Together it is more fun to {aim}."),
            ),
            default=4,
            ending="Be patient, and {x} will become easier every week.",
        ),
    },
    prose={
        "overview": ProseAnswer(
            wants=("{x}", "the sport of {x}"),
            paragraphs=(
                ("{X} is a sport with roots in {origin}.", "Its aim is to {aim}. The usual place for it is {place}."),
                (
                    "You do not need many things to begin.",
                    "For {x} you need {gear}. The most important technique is {move}.",
                ),
                ("{X} is good for your fitness.", "It trains {body}. Begin with {warm} to lower the risk of {risk}."),
            ),
        ),
    },
    plain={
        "gear": PlainAnswer(
            ("the equipment for {x}", "the gear needed for {x}"),
            ("What do I need for {x}?", "What equipment does {x} need?"),
            "For {x} you need {gear}.",
        ),
        "origin": PlainAnswer(
            ("the origin of {x}", "the place where {x} comes from"),
            ("Where does {x} come from?", "Where did {x} begin?"),
            "{X} has its roots in {origin}.",
        ),
        "aim": PlainAnswer(
            ("the aim of {x}", "the goal of {x}"),
            ("What is {x} about?", "How do you win at {x}?"),
            "The aim of {x} is to {aim}.",
        ),
    },
    sentence="{X} is a sport from {origin} in which the aim is to {aim}.",
    poem=(
        "Today is the day for {x},",
        "so bring {gear}.",
        "First comes {warm}, then we start,",
        "and {move} is the best part.",
    ),
    compare=(
        ("place", "the usual place for {x} is {place}"),
        ("equipment", "for {x} you need {gear}"),
        ("fitness", "{x} trains {body}"),
    ),
    check=(
        "origin",
        "Does {x} come from {value}?",
        "Yes, {x} has its roots in {origin}.",
        "No, {x} has its roots in {origin}.",
    ),
)

INSTRUMENTS = Category(
    name="instruments",
    columns=("kind", "sound", "part", "play", "music", "care", "origin", "exercise"),
    table="""
the piano | keyboard instruments | clear and full | the keys | pressing keys with ten fingers | classical sonatas | having it tuned every year | Italy | slow scales
the violin | string instruments | bright and singing | the bow | drawing the bow over four strings | symphonies | wiping off the rosin | Cremona | long open strings
the guitar | string instruments | warm and round | the frets | plucking six strings | folk songs | changing the strings often | Spain | simple chords
the flute | wind instruments | soft and airy | the mouthpiece | blowing across a hole | pastoral melodies | drying it with a cloth | ancient caves | long quiet notes
the trumpet | brass instruments | loud and shining | the three valves | buzzing the lips | fanfares | oiling the valves | old royal courts | lip slurs
the drums | percussion instruments | strong and dry | the sticks | hitting skins with sticks | rock music | tightening the skins | many old cultures | single strokes
the cello | string instruments | deep and dark | the endpin | sitting with the bow across the strings | solo suites | loosening the bow | northern Italy | slow bow strokes
the clarinet | wind instruments | smooth and woody | the reed | blowing over a single reed | swing | drying the reed | Nuremberg | notes in the low register
the harp | string instruments | gentle and floating | the pedals | plucking many strings with both hands | lullabies | keeping it away from heat | Mesopotamia | broken chords
the accordion | keyboard instruments | reedy and cheerful | the bellows | pushing and pulling the bellows | dance tunes | closing the straps | Vienna | even bellows movements
the saxophone | wind instruments | rich and smoky | the brass body | blowing while pressing many keys | jazz | swabbing the inside | Belgium | breathing from the belly
the organ | keyboard instruments | huge and solemn | the pipes | using hands and feet together | church hymns | cleaning the pipes | Alexandria | pedal lines
the ukulele | string instruments | light and sunny | the small neck | strumming four nylon strings | island songs | keeping it in a case | Hawaii | down and up strums
the xylophone | percussion instruments | short and wooden | the mallets | striking wooden bars | children's songs | dusting the bars | Southeast Asia | rolls with both hands
""",
    lists={
        "facts": ListAnswer(
            wants=(
                "{n} facts about {x}",
                "{n} interesting facts about {x}",
                "{n} things to know about {x}",
                "{n} things I should know about {x}",
            ),
            intro="Here are {n} facts about {x}:",
            items=(
                ("Sound", "The sound of {x} is {sound}. This makes it perfect for {music}."),
                ("Playing", "You play {x} by {play}. It takes some weeks until this feels natural."),
                (
                    "Important part",
                    "A very important part of {x} is {part}. Without it the sound would not be so {sound}.",
                ),
                ("Music", "{X} is often heard in {music}. Its sound fits this music very well."),
                ("Origin", "{X} comes from {origin}. Over the years makers have improved it again and again."),
                ("Family", "{X} belongs to the {kind}. Like the others in this family, it needs good care."),
            ),
            default=4,
            ending="All this makes {x} a wonderful instrument.",
        ),
        "learning": ListAnswer(
            wants=(
                "{n} tips for learning {x}",
                "{n} tips for beginners on {x}",
                "{n} ways to learn {x}",
                "{n} ways to practise {x}",
            ),
            intro="Here are {n} tips for learning {x}:",
            items=(
                ("Short practice", "Practise {x} for a short time every day. Begin each time with {exercise}."),
                ("Good technique", "Take your time with {play}. A teacher can show you how to do it without tension."),
                ("Listening", "Listen to {music} as often as you can. It shows you how {sound} {x} can sound."),
                ("Care", "Look after your instrument by {care}. Pay special attention to {part}."),
                ("Easy pieces", "Choose easy pieces first. You can find some that are made for {exercise}."),
                (
                    "Playing together",
                    "Play with friends as soon as you can. Simple pieces of {music} are good for this.",
                ),
            ),
            default=4,
        ),
    },
    prose={
        "overview": ProseAnswer(
            wants=("{x}", "the nature of {x}"),
            paragraphs=(
                (
                    "{X} belongs to the {kind} and comes from {origin}.",
                    "Its sound is {sound}. It is often heard in {music}.",
                ),
                (
                    "You need some practice to play it.",
                    "You play {x} by {play}. A good exercise for beginners is {exercise}.",
                ),
                ("Good care keeps the sound alive.", "Look after {x} by {care}. Pay special attention to {part}."),
            ),
        ),
    },
    plain={
        "sound": PlainAnswer(
            ("the sound of {x}", "the typical sound of {x}"),
            ("How does {x} sound?", "What does {x} sound like?"),
            "The sound of {x} is {sound}.",
        ),
        "origin": PlainAnswer(
            ("the origin of {x}", "the place where {x} comes from"),
            ("Where does {x} come from?", "Where was {x} first built?"),
            "{X} comes from {origin}.",
        ),
        "playing": PlainAnswer(
            ("the way to play {x}", "the right way of playing {x}"),
            ("How do you play {x}?", "How is {x} played?"),
            "You play {x} by {play}.",
        ),
    },
    sentence="{X} is one of the {kind}, and its sound is {sound}.",
    poem=(
        "I hear {x} tonight,",
        "its sound is {sound}, just right.",
        "By {play} it came to sing,",
        "and {music} is what it can bring.",
    ),
    compare=(
        ("sound", "the sound of {x} is {sound}"),
        ("playing", "you play {x} by {play}"),
        ("music", "{x} is often heard in {music}"),
    ),
    check=("kind", "Is {x} one of the {value}?", "Yes, {x} is one of the {kind}.", "No, {x} is one of the {kind}."),
)

PLACES = Category(
    name="places",
    columns=("country", "sight", "food", "walk", "season", "history", "transport", "gift"),
    table="""
Paris | France | the Eiffel Tower | fresh croissants | the banks of the Seine | spring | the great revolution | the metro | perfume
Rome | Italy | the Colosseum | thin pizza | the old forum | early autumn | the ancient emperors | the tram | leather bags
London | England | Tower Bridge | fish and chips | Hyde Park | early summer | the age of the steam engine | the red bus | black tea
Berlin | Germany | the Brandenburg Gate | curry sausage | the green Tiergarten | late summer | the fall of the wall | the city train | street art prints
Vienna | Austria | Schoenbrunn Palace | chocolate cake | the ring road | December | the court of the Habsburgs | a horse carriage | sweet wafers
Lisbon | Portugal | Belem Tower | custard tarts | the steep Alfama | May | the great sea voyages | the yellow tram | painted tiles
Athens | Greece | the Acropolis | grilled lamb | the Plaka | April | the birth of democracy | the blue trolley | olive soap
Prague | Czechia | Charles Bridge | bread dumplings | the castle hill | snowy January | the kings of Bohemia | the night tram | cut glass
Kyoto | Japan | the Golden Pavilion | green tea sweets | the bamboo grove | cherry time | a thousand years of emperors | a rented bicycle | silk fans
Cairo | Egypt | the pyramids | bean stew | the old bazaar | mild winter | the pharaohs | a river boat | papyrus scrolls
New York | America | the Statue of Liberty | bagels | Central Park | golden October | millions of immigrants | the subway | baseball caps
Istanbul | Turkey | Hagia Sophia | sesame rings | the Galata bridge | tulip season | two great empires | the ferry | woven carpets
Stockholm | Sweden | the Vasa Museum | cinnamon buns | the narrow old town | midsummer | the old trading ships | a small steamer | wooden horses
Marrakesh | Morocco | the Koutoubia Mosque | couscous | the Majorelle garden | March | the desert caravans | a donkey cart | brass lamps
""",
    lists={
        "sights": ListAnswer(
            wants=(
                "{n} things to do in {x}",
                "{n} ideas for a visit to {x}",
                "{n} reasons to visit {x}",
                "{n} ideas for a day in {x}",
            ),
            intro="Here are {n} ideas for a visit to {x}:",
            items=(
                ("Sightseeing", "Start with {sight}. It is the best known sight in {x} and looks best in the morning."),
                ("Eating", "Try {food}. You will find this in almost every street of {x}."),
                ("Walking", "Take a walk and see {walk}. It is a good place to watch the life of {x}."),
                ("History", "Visit a museum about {history}. It explains a lot about {x} and about {country}."),
                ("Getting around", "Take {transport} at least once. It is part of the life in {x}."),
                ("Shopping", "Buy {gift} before you leave. It is what most people bring home from {x}."),
            ),
            default=4,
        ),
        "planning": ListAnswer(
            wants=("{n} tips for a trip to {x}", "{n} tips for planning a trip to {x}", "{n} travel tips for {x}"),
            intro="Here are {n} tips for a trip to {x}:",
            items=(
                ("Season", "The best time for {x} is {season}. Then the weather is just right for long walks."),
                ("Tickets", "Book your ticket for {sight} early. In {season} there are long queues."),
                ("Transport", "Use {transport} in the city. It brings you to {sight} without trouble."),
                ("Food", "Do not eat near {sight}. You get better {food} in the small streets."),
                ("Language", "Learn a few polite words before you go. People in {country} will be happy about it."),
                ("Luggage", "Leave some room in your bag. You will want to bring home {gift}."),
            ),
            default=4,
            ending="I wish you a good trip to {x}.",
        ),
    },
    prose={
        "history": ProseAnswer(
            wants=("{x}", "the city of {x}"),
            paragraphs=(
                ("{X} is a famous city in {country}.", "It was shaped by {history}. Its best known sight is {sight}."),
                ("The city is also a good place to eat and to stroll.", "Try {food} and take a walk to see {walk}."),
                ("A visit is easy to plan.", "The best time for {x} is {season}. Use {transport} to get around."),
            ),
            ending="Many people who have seen {x} want to come back.",
        ),
    },
    plain={
        "sight": PlainAnswer(
            ("the best known sight in {x}", "the most famous sight of {x}"),
            ("What should I see in {x}?", "Which sight is {x} famous for?"),
            "The best known sight in {x} is {sight}.",
        ),
        "season": PlainAnswer(
            ("the best time for {x}", "the best time to visit {x}"),
            ("When should I go to {x}?", "When is {x} at its best?"),
            "The best time for {x} is {season}.",
        ),
        "country": PlainAnswer(
            ("the country of {x}", "the country in which {x} lies"),
            ("Where is {x}?", "In which country is {x}?"),
            "{X} is a famous city in {country}.",
        ),
    },
    sentence="{X} is a famous city in {country} that is best known for {sight}.",
    poem=(
        "In {season} I go away",
        "to see {x} for a day.",
        "I eat {food} in the sun",
        "and ride {transport} just for fun.",
    ),
    compare=(
        ("sights", "the best known sight in {x} is {sight}"),
        ("food", "in {x} you should try {food}"),
        ("season", "the best time for {x} is {season}"),
    ),
    check=(
        "country",
        "Is {x} in {value}?",
        "Yes, {x} is a famous city in {country}.",
        "No, {x} is a famous city in {country}.",
    ),
)

CHORES = Category(
    name="chores",
    columns=("tools", "start", "work", "finish", "often", "mistake", "trick", "gain"),
    table="""
washing the dishes | a sponge and warm water | scrape off the leftovers | wash the glasses first and the pans last | let everything dry on a rack | every evening | too much soap | soak the burnt pans overnight | a clean kitchen
cleaning windows | a squeegee and a bucket | brush off the dust | wipe the glass from top to bottom | dry the edges with a cloth | every two months | working in bright sun | polish with old newspaper | more light
ironing shirts | an iron and a board | sort the shirts by fabric | press the collar first and the sleeves last | hang each shirt up | once a week | an iron that is too hot | iron while the cloth is damp | a neat look
vacuuming carpets | a vacuum cleaner | pick up small things | move slowly in straight lines | empty the dust bag | twice a week | moving too fast | sprinkle soda against smells | less dust
making the bed | fresh sheets | shake out the pillows | pull the sheet tight at the corners | smooth the blanket | every morning | covering it while it is warm | open the window first | a tidy bedroom
doing the laundry | a washing machine and detergent | sort the clothes by colour | fill the drum loosely | hang the clothes up at once | twice a week | a drum that is too full | turn dark clothes inside out | fresh clothes
cleaning the bathroom | gloves and vinegar cleaner | open the window | scrub the tiles before the floor | rinse everything with clear water | every Saturday | mixing cleaners | leave the cleaner on for five minutes | good hygiene
mopping the floor | a mop and a bucket | sweep the room | work from the far corner to the door | let the floor dry | every weekend | a mop that is too wet | change the water often | a shining floor
taking out the rubbish | strong bags | separate glass and paper | tie the bags tightly | wash the bin | every second day | overfull bags | put paper on the bottom of the bin | no bad smells
cleaning the oven | baking soda and a scraper | let the oven cool down | cover the dirt with a paste | wipe out the rest | four times a year | harsh sprays | let the paste work overnight | better baking
dusting shelves | a soft cloth | take the books down | wipe from top to bottom | put everything back | every ten days | a dry feather duster | moisten the cloth a little | fewer allergies
polishing shoes | a brush and shoe cream | remove the laces | rub in the cream in small circles | brush until they shine | once a month | cream on dirty leather | use an old cotton sock | longer life
defrosting the freezer | towels and a bowl of hot water | take out all the food | let the ice melt slowly | dry the inside | once a year | scratching with a knife | wrap the food in blankets | lower power bills
descaling the kettle | vinegar and a soft brush | empty the kettle | boil water with vinegar | rinse it three times | every six weeks | forgetting to rinse | use a slice of lemon | better tea
""",
    lists={
        "steps": ListAnswer(
            wants=("{n} steps for {x}", "{n} simple steps for {x}", "{n} steps that I should follow when {x}"),
            intro="Follow these {n} steps when {x}:",
            items=(
                ("Get ready", "You need {tools}. Put everything in reach before you begin."),
                ("Prepare", "First {start}. This makes the next steps much easier."),
                ("Do the main work", "Now {work}. Avoid {mistake}, because this causes trouble later."),
                ("Finish", "At the end {finish}. Then put {tools} back in the right place."),
                ("Improve", "Next time try a trick: {trick}. It saves time and effort."),
                ("Repeat", "Do this {often}. The reward is {gain}."),
            ),
            default=4,
            ending="After that you have finished {x}.",
        ),
        "tips": ListAnswer(
            wants=("{n} tips for {x}", "{n} good tips for {x}", "{n} ways to get better at {x}", "{n} hints for {x}"),
            intro="Here are {n} tips for {x}:",
            items=(
                ("Right tools", "Use {tools}. With these tools {x} takes half the time."),
                ("Right order", "First {start}, then {work}. This order saves a lot of effort."),
                ("Clever trick", "Here is an old trick: {trick}. You will be surprised how well it works."),
                ("Common mistake", "The most common mistake when {x} is {mistake}. Try to avoid it."),
                ("Fixed rhythm", "Plan {x} {often}. In this way the work never becomes too much."),
            ),
            default=4,
        ),
    },
    prose={
        "guide": ProseAnswer(
            wants=("{x}", "the art of {x}"),
            paragraphs=(
                ("Good preparation makes {x} easy.", "You need {tools}. First {start}."),
                ("The main work comes next.", "Now {work}. At the end {finish}."),
                ("Experience helps you to do it well.", "Avoid {mistake} and try a trick: {trick}."),
            ),
        ),
    },
    plain={
        "often": PlainAnswer(
            ("the right rhythm for {x}", "the best rhythm for {x}"),
            ("How often should I plan {x}?", "How often is {x} needed?"),
            "Plan {x} {often}.",
        ),
        "tools": PlainAnswer(
            ("the right equipment for {x}", "the set of tools for {x}"),
            ("What do I need for {x}?", "Which tools does {x} need?"),
            "For {x} you need {tools}.",
        ),
        "mistake": PlainAnswer(
            ("the most common mistake when {x}", "the mistake to avoid when {x}"),
            ("What should I avoid when {x}?", "What do people do wrong when {x}?"),
            "The most common mistake when {x} is {mistake}.",
        ),
    },
    sentence="For {x} you need {tools}, and the reward is {gain}.",
    poem=(
        "Today I am {x}, hooray,",
        "with {tools} I start the day.",
        "I know a trick, so {trick},",
        "and {gain} will come quick.",
    ),
    compare=(
        ("tools", "for {x} you need {tools}"),
        ("rhythm", "{x} should be planned {often}"),
        ("reward", "the reward of {x} is {gain}"),
    ),
    check=("often", "Should I plan {x} {value}?", "Yes, plan {x} {often}.", "No, plan {x} {often}."),
)

PLANTS = Category(
    name="plants",
    columns=("kind", "light", "soil", "water", "sow", "bloom", "pest", "friend"),
    table="""
roses | shrubs | six hours of sun | deep loam | once a week at the roots | in late autumn | in June | aphids | lavender
sunflowers | annual flowers | full sun all day | rich soil | every second day | in April | in August | slugs | cucumbers
tulips | bulb flowers | a sunny bed | sandy soil | only in dry springs | in October | in April | voles | daffodils
lavender plants | evergreen herbs | hot sun | stony soil | hardly ever | in May | in July | leafhoppers | sage
basil plants | kitchen herbs | a bright window | soft potting soil | a little every morning | in March | in late summer | whiteflies | peppers
orchids | house plants | light without sun | bark chips | a bath every ten days | from a nursery pot | in winter | mealybugs | ferns
cacti | desert plants | a south window | gritty sand | once a month | in warm trays | in early summer | scale insects | aloes
strawberry plants | berry plants | morning sun | slightly acid soil | daily while fruiting | in August | in May | blackbirds | garlic
blueberry bushes | berry bushes | half a day of sun | peat with bark | rain water only | in early spring | in late May | hungry starlings | heathers
hydrangeas | garden shrubs | half shade | acid soil | generously in summer | in warm May | in midsummer | spider mites | hostas
pumpkins | vine vegetables | a warm open place | compost | a full can each evening | in pots in April | in July | powdery mildew | sweet corn
radishes | root vegetables | light shade | loose soil | evenly moist | every two weeks | rarely at all | flea beetles | lettuce
apple trees | fruit trees | an open meadow | clay with humus | in their first years | in November | in early May | codling moths | nasturtiums
ferns | shade plants | deep shade | woodland soil | whenever it is dry | in damp corners | never | snails | foxgloves
""",
    lists={
        "care": ListAnswer(
            wants=(
                "{n} tips for growing {x}",
                "{n} tips on the care of {x}",
                "{n} rules for growing {x}",
                "{n} things to remember when growing {x}",
            ),
            intro="Here are {n} tips for growing {x}:",
            items=(
                ("Light", "Give your {x} {light}. This is what {kind} like these need to grow well."),
                ("Soil", "Plant {x} in {soil}. In the wrong soil they soon become weak."),
                ("Water", "The rule for watering {x} is simple: {water}. Check the soil with your finger first."),
                ("Planting", "Start your {x} {sow}. At this time the young roots grow best in {soil}."),
                ("Pests", "Look under the leaves for {pest}. Remove them before they spread to the other {kind}."),
                ("Neighbours", "Put {x} next to {friend}. These neighbours help to keep {pest} away."),
                ("Flowers", "Expect flowers {bloom}. Cut off what has faded, and give them {light}."),
            ),
            default=4,
            ending="Follow these tips and your {x} will do well.",
        ),
        "problems": ListAnswer(
            wants=("{n} common mistakes with {x}", "{n} mistakes people make with {x}", "{n} problems with {x}"),
            intro="Here are {n} common mistakes with {x}:",
            items=(
                (
                    "Wrong place",
                    "Many gardeners forget that {x} need {light}. In other places they grow thin and pale.",
                ),
                ("Wrong soil", "{X} want {soil}. Do not just put them into any old earth."),
                ("Wrong watering", "People often water {x} badly. The right way is: {water}."),
                ("Wrong time", "The best start for {x} is {sow}. At other times many of them die."),
                ("Late help", "The enemies of {x} are {pest}. If you react too late, you lose the plants."),
            ),
            default=4,
        ),
    },
    prose={
        "overview": ProseAnswer(
            wants=("{x}", "the needs of {x}"),
            paragraphs=(
                ("{X} are {kind} that many gardeners love.", "They need {light} and {soil}. They flower {bloom}."),
                ("They are not difficult to grow.", "Start your {x} {sow}. The rule for watering is: {water}."),
                (
                    "Watch your {x} with care.",
                    "Look under the leaves for {pest}. Good neighbours for them are {friend}.",
                ),
            ),
        ),
    },
    plain={
        "water": PlainAnswer(
            ("the rule for watering {x}", "the right way to water {x}"),
            ("How should I water {x}?", "How often do {x} need water?"),
            "The rule for watering {x} is simple: {water}.",
        ),
        "soil": PlainAnswer(
            ("the right soil for {x}", "the best soil for {x}"),
            ("Which soil do {x} need?", "What should I plant {x} in?"),
            "Plant {x} in {soil}.",
        ),
        "light": PlainAnswer(
            ("the right light for {x}", "the best light for {x}"),
            ("How much light do {x} need?", "Which light is best for {x}?"),
            "Give your {x} {light}.",
        ),
    },
    sentence="{X} are {kind} that need {light} and {soil}.",
    poem=(
        "My {x} are fine to see,",
        "with {light} they grow for me.",
        "I keep the {pest} away,",
        "and {friend} stand near them every day.",
    ),
    compare=(("light", "{x} need {light}"), ("soil", "{x} want {soil}"), ("watering", "the rule for {x} is {water}")),
    check=("kind", "Are {x} {value}?", "Yes, {x} are {kind}.", "No, {x} are {kind}."),
)

SCIENCE = Category(
    name="science",
    columns=("field", "what", "example", "cause", "use", "person", "unit", "test"),
    table="""
gravity | physics | a force that pulls masses together | a falling apple | mass | planning the path of satellites | Isaac Newton | newtons | dropping two balls at once
magnetism | physics | a force between moving charges | a compass needle | spinning electrons | building motors | William Gilbert | teslas | spreading iron filings
photosynthesis | biology | the making of sugar with light | green leaves in the sun | chlorophyll | growing crops | Jan Ingenhousz | moles of oxygen | covering a leaf with foil
evaporation | chemistry | the change from liquid to gas | a drying puddle | fast molecules | making sea salt | John Dalton | grams per hour | leaving a dish in the sun
electricity | physics | a flow of charged particles | lightning | voltage | lighting our homes | Alessandro Volta | amperes | rubbing a balloon on wool
sound | physics | a wave of pressure in the air | a ringing bell | vibration | talking to each other | Hermann Helmholtz | decibels | stretching a rubber band
heredity | biology | the passing on of traits | the colour of eyes | genes | breeding better wheat | Gregor Mendel | generations | crossing pea plants
erosion | geology | the wearing away of land | a deep canyon | wind and water | shaping safe slopes | James Hutton | millimetres per year | pouring water on a sand hill
fermentation | biology | the change of sugar by microbes | rising dough | yeast | baking bread | Louis Pasteur | bubbles per minute | mixing yeast with warm sugar water
friction | physics | a force that slows sliding things | brakes on a bicycle | rough surfaces | walking without slipping | Leonardo da Vinci | coefficients | pulling a block over a board
combustion | chemistry | a fast reaction with oxygen | a burning candle | heat and fuel | heating a house | Antoine Lavoisier | joules | putting a glass over a flame
evolution | biology | the slow change of living things | the beaks of finches | natural selection | understanding new germs | Charles Darwin | millions of years | comparing old bones
refraction | optics | the bending of light | a straw in a glass | a change of speed | making glasses | Willebrord Snell | degrees | looking at a coin in water
condensation | meteorology | the change from gas to liquid | dew on the grass | cooling air | collecting water from fog | Luke Howard | litres | breathing on a cold mirror
""",
    lists={
        "facts": ListAnswer(
            wants=(
                "{n} facts about {x}",
                "{n} interesting facts about {x}",
                "{n} things to know about {x}",
                "{n} things I should know about {x}",
            ),
            intro="Here are {n} facts about {x}:",
            items=(
                ("Meaning", "In {field}, {x} is {what}. A good example of it is {example}."),
                ("Cause", "The cause of {x} is {cause}. Without it there would be no such thing as {example}."),
                ("Example", "You can see {x} in {example}. Look at it closely the next time."),
                ("Use", "People use {x} for {use}. This would not be possible without knowledge of {field}."),
                ("Discovery", "{X} was studied by {person}. This work is still important in {field} today."),
                ("Measurement", "{X} is often described in {unit}. Such numbers help us to compare things."),
                ("Experiment", "You can study {x} by {test}. It is safe and shows you the role of {cause}."),
            ),
            default=4,
        ),
        "lesson": ListAnswer(
            wants=("{n} ideas for a lesson about {x}", "{n} ways to teach {x}", "{n} ways to explain {x} to children"),
            intro="Here are {n} ways to explain {x}:",
            items=(
                ("Start with an example", "Show {example} first. Everybody can see {x} in it at once."),
                ("Do an experiment", "Let the children try {test}. Ask them what they see and why."),
                ("Say it simply", "Explain that {x} is {what}. Use short sentences and a drawing."),
                ("Tell a story", "Tell them about {person}. Stories make {field} come alive."),
                ("Show the use", "Talk about {use}. It shows why {x} matters to all of us."),
            ),
            default=4,
            ending="In this way everybody can understand {x}.",
        ),
    },
    prose={
        "overview": ProseAnswer(
            wants=("{x}", "the idea of {x}"),
            paragraphs=(
                ("In {field}, {x} is {what}.", "The cause of it is {cause}. A good example is {example}."),
                (
                    "Our knowledge of {x} grew over time.",
                    "It was studied by {person}. It is often described in {unit}.",
                ),
                ("{X} also matters in daily life.", "People use it for {use}. You can study it by {test}."),
            ),
            ending="This is why {x} is worth learning about.",
        ),
    },
    plain={
        "meaning": PlainAnswer(
            ("the meaning of {x}", "the definition of {x}"),
            ("What is {x}?", "What does {x} mean?"),
            "In {field}, {x} is {what}.",
        ),
        "person": PlainAnswer(
            ("the name of a person who studied {x}", "the scientist known for {x}"),
            ("Who studied {x}?", "Which scientist studied {x}?"),
            "{X} was studied by {person}.",
        ),
        "cause": PlainAnswer(
            ("the cause of {x}", "the reason for {x}"),
            ("What causes {x}?", "Why is there {x}?"),
            "The cause of {x} is {cause}.",
        ),
    },
    sentence="{X} is {what}, and you can see it in {example}.",
    poem=(
        "Look at {example}, my friend,",
        "it is {x} in the end.",
        "The cause is {cause}, we know,",
        "{person} told us so.",
    ),
    compare=(
        ("meaning", "{x} is {what}"),
        ("cause", "the cause of {x} is {cause}"),
        ("use", "people use {x} for {use}"),
    ),
    check=("field", "Does {x} belong to {value}?", "Yes, {x} belongs to {field}.", "No, {x} belongs to {field}."),
)

HABITS = Category(
    name="habits",
    columns=("goal", "first", "time", "place", "help", "trap", "sign", "reward"),
    table="""
drinking more water | clear skin and energy | put a glass beside your bed | before every meal | your desk | a marked bottle | sweet drinks | pale urine | a slice of lemon
sleeping better | rested mornings | switch off the phone early | at ten in the evening | a dark bedroom | a soft eye mask | late coffee | waking before the alarm | a slow breakfast
walking more | a strong heart | get off the bus one stop early | after lunch | the nearest park | a step counter | bad weather as an excuse | easy breathing on stairs | new shoes
sitting less | a healthy back | stand up for phone calls | every half hour | the kitchen counter | a high table | endless films | no more stiff hips | a warm bath
eating slowly | good digestion | put down the fork after each bite | at every dinner | a set table | small plates | eating at the screen | feeling full earlier | a fine dessert
stretching daily | flexible joints | touch your toes gently | right after waking | a soft rug | a short video | jerky movements | free shoulders | a cup of cocoa
brushing teeth well | healthy gums | brush in small circles | two minutes twice a day | the bathroom mirror | an hourglass | pressing too hard | no bleeding | a bright smile
calming down | inner peace | breathe in through the nose | in the lunch break | a quiet bench | soft music | checking the news | a slow pulse | an evening with friends
learning new words | a rich vocabulary | write five words on cards | on the bus to work | a cosy chair | a box with cards | too many words at once | words coming without thinking | a film in that language
taking notes | clear thoughts | draw a margin on the page | during every lecture | the front row | coloured pens | copying every word | short pages | a beautiful notebook
preparing for exams | good marks | make a list of all topics | three weeks ahead | the library | old exam papers | learning all night | answering without notes | a day at the lake
reading more | wide knowledge | read two pages tonight | before falling asleep | the corner of the sofa | a reading list | boring books | finished chapters | a visit to the bookshop
speaking freely | confidence | talk to a mirror | every Monday evening | a small meeting | a few key words | reading from paper | a steady voice | warm applause
staying focused | deep work | close all other windows | in the first hours of the day | a tidy room | a kitchen timer | messages every minute | time flying by | an early end of work
""",
    lists={
        "tips": ListAnswer(
            wants=("{n} tips for {x}", "{n} good tips for {x}", "{n} ways of {x}", "{n} ideas for {x}"),
            intro="Here are {n} tips for {x}:",
            items=(
                ("Know your goal", "Remember why you do it. The goal of {x} is {goal}."),
                ("Start small", "Take one easy step first: {first}. You can do this even today."),
                ("Fix a time", "Do it {time}. A fixed time turns {x} into a habit."),
                ("Choose a place", "The best place for {x} is {place}. Go there as often as you can."),
                ("Get help", "Make it easier with {help}. It reminds you of {x} without any effort."),
                ("Avoid the trap", "The biggest trap is {trap}. Watch out for it in the first weeks."),
                ("See the success", "You can see your success by {sign}. It shows that {x} works."),
                ("Enjoy a reward", "After a good week, treat yourself to {reward}. You have earned it by {x}."),
            ),
            default=4,
            ending="Stay with it, and {x} will soon feel natural.",
        ),
        "plan": ListAnswer(
            wants=("{n} steps towards {x}", "{n} steps for {x}", "{n} stages of a plan for {x}"),
            intro="Here is a plan with {n} steps for {x}:",
            items=(
                ("First day", "Begin with one easy step: {first}. Do not try to do more."),
                ("First week", "Repeat it {time}. Use {help} so that you do not forget it."),
                ("Second week", "Go to {place} for it. Keep away from {trap}."),
                ("Third week", "Look for the first results. A good sign is {sign}."),
                ("After a month", "By now you can feel the gain: {goal}. Treat yourself to {reward}."),
            ),
            default=4,
        ),
    },
    prose={
        "advice": ProseAnswer(
            wants=("{x}", "the value of {x}"),
            paragraphs=(
                ("There is a good reason for {x}.", "The goal is {goal}. A first sign of success is {sign}."),
                ("The beginning is easier than you think.", "Take one easy step: {first}. Do it {time}."),
                ("Some things make it easier.", "The best place is {place}. Use {help} and keep away from {trap}."),
            ),
        ),
    },
    plain={
        "goal": PlainAnswer(
            ("the goal of {x}", "the main benefit of {x}"),
            ("Why is {x} good?", "What is {x} good for?"),
            "The goal of {x} is {goal}.",
        ),
        "trap": PlainAnswer(
            ("the biggest trap in {x}", "the worst enemy of {x}"),
            ("What should I avoid when {x}?", "What stands in the way of {x}?"),
            "The biggest trap is {trap}.",
        ),
        "time": PlainAnswer(
            ("the best time for {x}", "the right time for {x}"),
            ("When should I practise {x}?", "When is {x} easiest?"),
            "Do it {time}.",
        ),
    },
    sentence="The goal of {x} is {goal}, and the best time for it is {time}.",
    poem=(
        "I start with {x} today,",
        "{place} is where I stay.",
        "No more {trap} for me,",
        "{reward} is what I soon will see.",
    ),
    compare=(
        ("goals", "the goal of {x} is {goal}"),
        ("time", "the best time for {x} is {time}"),
        ("place", "the best place for {x} is {place}"),
    ),
    check=("goal", "Is {value} the goal of {x}?", "Yes, the goal of {x} is {goal}.", "No, the goal of {x} is {goal}."),
)

CATEGORIES: tuple[Category, ...] = (ANIMALS, FOODS, SPORTS, INSTRUMENTS, PLACES, CHORES, PLANTS, SCIENCE, HABITS)

CODE: tuple[tuple[str, str], ...] = (
    ("that prints hello", 'print("hello")'),
    ("that adds two numbers", "def add(a, b):\n    return a + b"),
    ("that squares a number", "def square(x):\n    return x * x"),
    ("that counts to ten", "for i in range(1, 11):\n    print(i)"),
    ("that reverses a string", "def reverse(text):\n    return text[::-1]"),
    ("that finds the larger of two numbers", "def larger(a, b):\n    if a > b:\n        return a\n    return b"),
    ("that checks if a number is even", "def is_even(n):\n    return n % 2 == 0"),
    (
        "that sums a list",
        "def total(items):\n    result = 0\n    for item in items:\n        result += item\n    return result",
    ),
    ("that reads a file", 'with open("notes.txt") as file:\n    print(file.read())'),
    ("that counts the words of a text", "def count_words(text):\n    return len(text.split())"),
)

SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello!", "Hi there!", "Good morning!", "Hello, how are you?", "Hey!"), "Hello! How can I help you today?"),
    (
        ("Thank you!", "Thanks a lot!", "Thank you very much!", "Thanks!", "Great, thank you!"),
        "You are welcome! Feel free to ask me anything else.",
    ),
    (("Goodbye!", "Bye!", "See you later!", "Have a nice day!"), "Goodbye! Have a nice day."),
    (
        ("Who are you?", "What is your name?", "Tell me who you are.", "What are you?", "Who am I talking to?"),
        "I am a tiny language model that can write parts of an answer at the same time.",
    ),
    (
        ("What can you do?", "How can you help me?", "What do you know?", "What can I ask you?"),
        "I know a little about animals, foods, sports, instruments, cities, housework, plants, science and good habits.",
    ),
    (
        ("Say something nice.", "Cheer me up.", "Tell me something nice.", "Say a kind word."),
        "You ask good questions, and that is how all learning begins.",
    ),
)
