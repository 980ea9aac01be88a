"""Words that openings are made of; one list a line block, its items apart by semicolons."""

from __future__ import annotations


def items(block: str) -> list[str]:
    """The items of a block, in order."""
    return [" ".join(item.split()) for item in block.split(";") if item.strip()]


SUBJECTS = items("""
photosynthesis; the water cycle; plate tectonics; the immune system; black holes; magnetism; the printing
press; coral reefs; glaciers; volcanoes; the human heart; probability; prime numbers; the French Revolution;
the Silk Road; feudalism; inflation; supply and demand; the stock market; trade unions; democracy; the Roman
Republic; the Black Death; the Industrial Revolution; steam engines; electricity; radio; semiconductors;
lasers; vaccines; antibiotics; DNA; evolution; natural selection; honeybees; migratory birds; whales; spiders;
mushrooms; mosses; oak trees; wheat; rice; coffee; tea; chocolate; salt; sugar; bread; beer brewing;
glassmaking; pottery; weaving; paper; ink; photography; cinema; jazz; opera; folk music; the violin; the
piano; ballet; chess; football; marathon running; mountaineering; sailing; navigation; maps; the compass;
clocks; calendars; the alphabet; sign language; translation; dreams; memory; sleep; anxiety; habits;
childhood; education; literacy; libraries; museums; architecture; bridges; dams; canals; railways; bicycles;
aircraft; rockets; satellites; the Moon; Mars; comets; the Sun; galaxies; dark matter; atoms; entropy;
chemical bonds; acids and bases; crystals; plastics; steel; concrete; wood; soil; compost; irrigation;
deserts; rainforests; tundra; rivers; estuaries; tides; hurricanes; droughts; wildfires; earthquakes; climate
change; solar power; wind turbines; nuclear energy; batteries; recycling; sewage; public health; nursing;
surgery; dentistry; nutrition; diabetes; asthma; malaria; smallpox; ethics; logic; free will; the scientific
method; statistics; algorithms; encryption; databases; operating systems; the Internet; search engines;
machine learning; robotics; typography; graphic design; advertising; insurance; taxation; banking; money;
property; contracts; juries; prisons; constitutions; elections; empires; colonialism; slavery; refugees;
nomads; monasteries; pilgrimage; mythology; fairy tales; the novel; satire; haiku; tragedy; perspective in
painting; fresco; sculpture; embroidery; perfume; gemstones; gold; coins; postage stamps
""")

PLACES = items("""
Lisbon; Nairobi; Kyoto; Buenos Aires; Glasgow; Montreal; Mumbai; Lagos; Prague; Havana; Reykjavik; Istanbul;
Hanoi; Melbourne; Chicago; New Orleans; Vancouver; Cape Town; Cairo; Damascus; Tashkent; Warsaw; Naples;
Seville; Bergen; Riga; Dublin; Leeds; Bristol; Boston; Seattle; Detroit; Denver; Oaxaca; Lima; Quito; Bogota;
Santiago; Manila; Jakarta; Seoul; Taipei; Chengdu; Lahore; Dhaka; Colombo; Kathmandu; Addis Ababa; Accra;
Dakar; Marrakesh; Tunis; Athens; Sofia; Budapest; Vienna; Zurich; Lyon; Ghent; Rotterdam; Hamburg; Leipzig;
Gdansk; Tallinn; Helsinki; Tromso; Anchorage; Honolulu; Auckland; Perth; Hobart; the Orkney Islands; the
Azores; Patagonia; the Mekong Delta; the Scottish Highlands
""")

FIRST = items("""
Amara; Elena; Tomasz; Priya; Kofi; Ingrid; Mateo; Yuki; Fatima; Declan; Rosa; Viktor; Leila; Samuel; Mei;
Hassan; Clara; Diego; Aoife; Nikolai; Grace; Omar; Beatriz; Jonas; Ruth; Kwame; Hannah; Luis; Svetlana; Arjun;
Margaret; Pedro; Naomi; Walter; Ines; Tariq; Agnes; Henrik; Lucia; Joseph; Anjali; Frank; Zainab; Edith;
Marco; Olga; Thomas; Wanjiru; Peter; Sofia; Ravi; Eleanor; Chidi; Martha; George; Noor; Helen; Andre; Lin;
Abigail
""")

LAST = items("""
Okafor; Lindqvist; Moreno; Tanaka; O'Brien; Kowalski; Haddad; Fernandes; Novak; Mbeki; Chen; Petrov; Hughes;
Rossi; Singh; Dubois; Keller; Nguyen; Abebe; Castillo; Whitfield; Ivanova; Rahman; Santos; Murray; Yilmaz;
Bergman; Achebe; Delgado; Park; Fischer; Mwangi; Sullivan; Kaur; Varga; Brandt; Osei; Romero; Hayes;
Takahashi; Weiss; Diallo; Grant; Popescu; Larsen; Ortega; Bauer; Ahmed; Carter; Nakamura; Silva; Walsh;
Koroma; Bennett; Horvat; Mehta
""")

WORK = items("""
botanist; civil engineer; novelist; long-distance runner; jazz pianist; historian; physician; carpenter;
astronomer; lighthouse keeper; schoolteacher; translator; marine biologist; photographer; labour organiser;
stage actress; chemist; economist; cartographer; composer; judge; nurse; architect; goalkeeper; ceramicist;
librarian; pilot; geologist; poet; mathematician; baker; diplomat; beekeeper; printmaker; veterinarian;
puppeteer; shipbuilder; radio presenter; farmer
""")

DISHES = items("""
lentil soup; roast chicken with lemon; sourdough bread; mushroom risotto; beef stew; fish tacos; vegetable
curry; apple pie; banana bread; potato gratin; chicken noodle soup; black bean chili; pad thai; shakshuka;
ratatouille; paella; beef rendang; jollof rice; pierogi; dumplings; miso soup; hummus; tabbouleh; falafel;
onion tart; carrot cake; lemon drizzle cake; oat biscuits; pancakes; waffles; omelette; meatballs in tomato
sauce; lasagne; gnocchi; pesto; roast root vegetables; coleslaw; pickled cucumbers; strawberry jam; rice
pudding; flatbread; cornbread; gumbo; shepherd's pie; ginger cookies; chocolate brownies; baked salmon;
ceviche; kimchi fried rice; pumpkin soup; borscht; gazpacho
""")

SKILLS = items("""
sharpen a kitchen knife; change a bicycle tyre; prune an apple tree; write a cover letter; learn a new
language; knit a scarf; build a bookshelf; start a compost heap; remove a wine stain; train a puppy; read a
balance sheet; plan a week of meals; bleed a radiator; back up a hard drive; set up a home network; repot a
houseplant; negotiate a salary; paint a wooden door; tie a bowline; give a short speech; take better
photographs at night; save for a house; hem a pair of trousers; make candles; grow tomatoes on a balcony; fix
a dripping tap; keep a diary; prepare for a job interview; teach a child to swim; choose running shoes; pack
for a long hike; start a reading group; clean a cast-iron pan; store potatoes over winter; record a podcast;
solve a Rubik's cube; play a first song on the guitar; insulate an attic; read a topographic map; write unit
tests; design a survey; brew loose-leaf tea; make a paper aeroplane; draw a portrait; stop procrastinating;
organise a small workshop; lay paving stones; care for a leather bag; avoid jet lag
""")

PRODUCTS = items("""
a cordless drill; noise-cancelling headphones; a cast-iron skillet; a hiking backpack; an electric kettle; a
robot vacuum cleaner; a mechanical keyboard; a mattress; a folding bicycle; a raincoat; a fountain pen; a
budget telescope; a baby monitor; a coffee grinder; an air fryer; trail running shoes; a sewing machine; a
laser printer; a sleeping bag; a garden hose; a smart thermostat; a board game about trains; a second-hand
camera; a desk lamp; a travel guitar; a rice cooker; a water filter; an office chair; a tent for four; a
cookbook; a hotel near the station; a seaside restaurant; a museum exhibition; a concert in the old town hall;
a debut novel; a documentary about rivers; a city walking tour; a language app
""")

FUNCTIONS = items("""
merge_sorted_lists; count_words; parse_date; is_palindrome; binary_search; flatten; moving_average;
read_config; fibonacci; levenshtein_distance; group_by_key; retry_with_backoff; validate_email; rotate_matrix;
topological_sort; lru_cache; matrix_multiply; format_currency; find_duplicates; gcd; quick_sort;
download_file; load_csv; hash_password; render_table; resize_image; shortest_path; tokenize; compress_string;
random_walk; sum_of_digits; roman_to_int; chunk_list; invert_dict; send_notification; median; prime_sieve;
transpose; convert_temperature; remove_outliers
""")

THINGS = items("""
Invoice; ShoppingCart; User; Queue; BankAccount; Matrix; Scheduler; Library; Graph; Parser; Temperature;
Playlist; Inventory; Ticket; Vector; Session; Recipe; Student; Order; Cache; Employee; Timer; Board; Sensor;
Document; Booking
""")

SPORTS = items("""
football; basketball; tennis; cricket; rugby; athletics; swimming; cycling; rowing; ice hockey; volleyball;
handball; gymnastics; boxing; judo; fencing; baseball; golf; sailing; skiing; speed skating; badminton; table
tennis; triathlon
""")

LAWS = items("""
the landlord's duty to repair; unfair dismissal; breach of contract; negligence; copyright in photographs;
trade marks; consumer refunds; the right to silence; search warrants; bail; child custody; the making of
wills; planning permission; data protection; defamation; employment of minors; freedom of assembly; product
liability; insolvency; arbitration; maritime salvage; asylum claims; patents on software; noise complaints;
boundary disputes; pension rights
""")
