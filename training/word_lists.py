"""Which words are names of people, which may be, and which never are. Read from Faker's lists, once per process.

Names of the locales in `_CORE` prove a name alone; those of all locales only beside other evidence, because a list of
every country's names holds most short words of English too. Knows nothing of text.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
import unicodedata
from collections.abc import Iterable

_CORE = "en_US en_GB en_IN en_IE en_NZ es_ES es_MX fr_FR de_DE it_IT tr_TR pt_BR nl_NL sv_SE da_DK pl_PL".split()
_CORE_LAST = "en_US en_GB en_IN es_ES es_MX fr_FR de_DE it_IT tr_TR pt_BR sv_SE da_DK no_NO pl_PL hu_HU fi_FI".split()

PLAIN_WORDS = frozenset(
    """a an and are as at be but by can do does for from had has have her here him his how i in is it me my no not
    of on or our out she he so sorry sure that the their them there they this to up us was we what when where
    which who will with would yes you your please thanks thank hello hi just like need want going looking trying
    calling writing able also name first last string str null none unknown test user users customer passenger
    agent assistant guest admin n/a na tbd example sample booking table mr mrs ms miss dr prof sir madam mister
    if then else because while after before until since about into over under between through during without within
    am pm im i'm it's that's don't can't i'd i'll i've let's let get got give go went come came make made take took see
    saw know think say said tell told ask asked use used find found work call called try feel leave put keep begin
    seem show hear play run move live believe hold bring happen provide sit stand lose pay paid meet include continue
    set learn change lead understand watch follow stop create speak read allow add spend grow open walk win offer
    remember consider appear buy wait serve die send sent expect build stay fall cut reach remain suggest raise pass
    sell require report decide pull all any both each few more most other some such only own same than too very
    could should may might must shall being been were did done having these those its why whose whom ok okay
    dear regards sincerely cheers yeah yep nope hey well now today tomorrow yesterday tonight morning afternoon
    evening night noon midnight day days week weeks month months year years hour hours minute minutes second seconds
    time times date dates one two three four five six seven eight nine ten eleven twelve hundred thousand million
    half quarter once twice another anyone someone everyone anything something everything nothing somebody anybody
    everybody nobody myself yourself himself herself themselves ourselves mine yours hers theirs ours
    """.split()
)
"""Never a name, however they are written."""

_COMMON_WORDS = frozenset(
    """account accounts bank banks card cards cash credit debit money payment payments transfer transfers transaction
    transactions balance deposit withdrawal withdraw refund fee fees charge charges cost price currency dollar dollars
    euro euros pound pounds cent cents loan mortgage saving savings current checking overseas abroad foreign
    international domestic overdraft statement atm pin app phone mobile email mail internet website online computer
    laptop device system data file files number code password passcode identity id verification security support service
    services help team manager staff company business shop store market merchant restaurant hotel hotels room rooms
    table tables reservation reservations booking bookings bookings order orders standing direct booked reserved seat
    seats flight flights airport airline plane train bus taxi car cars rental trip travel tour ticket tickets city town
    country state place location address street home house apartment office school college university hospital church
    museum library park beach mountain river lake island party people person persons adult adults child children kid
    kids baby man men woman women boy girl guy friend friends family wife husband partner mother father mom mum dad
    parent parents brother sister son daughter uncle aunt cousin neighbor neighbour boss colleague roommate landlord
    dinner lunch breakfast brunch meal food menu drink drinks wine beer coffee tea water pizza cancel confirm check
    cheque book information details question questions problem issue reason way thing things part parts kind type
    types list item items example examples new old good great best better bad big small large long short high low early
    late early earlier later next previous past recent recently always never often sometimes usually already still
    again soon away back down off outside inside around near nearby far left right top bottom front side full empty
    free busy ready available possible certain sure different special nice fine happy sad sick ill tired hungry urgent
    red blue green yellow black white gold silver platinum virtual physical disposable digital contactless swift sepa
    wire google apple amazon paypal visa mastercard monday tuesday wednesday thursday friday saturday sunday
    january february march april may june july august september october november december spring summer autumn fall
    winter north south east west northern southern eastern western american british english french german spanish
    italian european asian chinese japanese indian mexican thai korean greek turkish russian canadian australian
    christmas easter holiday birthday anniversary wedding meeting event concert show movie film movies music song songs
    album artist band game games sport sports team league cup match world war battle king queen prince princess
    president minister government court law case judge justice supreme federal national republic united states kingdom
    union general central royal imperial society institute academy foundation organization committee council department
    agency ministry bureau board association center centre station bridge tower palace castle temple square garden
    gardens hall theater theatre stadium arena gallery monument mount valley bay coast ocean sea desert forest
    weather temperature rain snow wind sun moon star stars earth mars venus jupiter saturn mercury sky space planet
    stock stocks index fund funds share shares bond bonds rate rates interest tax taxes income salary rent bill bills
    value values amount amounts total sum average minimum maximum percent percentage level levels size sizes length
    width height weight area volume distance speed force energy power pressure mass density angle radius circle triangle
    rectangle matrix vector function equation formula variable parameter parameters model algorithm method object class
    module program software hardware server network database query table column row key string integer float boolean
    array true false error errors log status version update updates delete remove insert select input output result
    results response request message messages text texts image images video videos audio photo photos page pages
    line lines word words letter letters title titles topic topics subject category categories section chapter
    """.split()
)

_VERBS = frozenset(
    """accept access achieve acquire act activate adapt adjust admit adopt advise afford agree aim alert allocate amend
    analyse analyze announce answer apologise apologize appeal apply appoint approach approve argue arrange arrive assess
    assign assist assume assure attach attempt attend attract authenticate authorise authorize avoid ban bet bid bind
    block blow borrow bother break breathe browse burn calculate calm capture care carry cast catch cause celebrate
    challenge chat cheat choose claim classify clean clear click climb collect combine comment commit communicate compare
    compete complain complete compose compute concentrate conclude conduct configure confuse connect construct consult
    consume contact contain contribute control convert convince cook cool copy correct count cover crash cry customise
    customize damage deactivate deal declare decline decrease deduct defend define delay deliver demand deny depart depend
    deposit describe design destroy detail determine develop dial differ discover discuss display dispute divide donate
    double doubt download draft drag draw dream dress drive drop earn eat edit email employ enable encourage end enjoy
    enquire ensure enter escape establish estimate evaluate examine exceed exchange excuse execute exist exit expand
    experience experiment explain explore export express extend extract face fail feed fetch fight figure fill filter
    finalise finalize finance finish fit fix fly focus force forget forgive forward freeze gain gather generate grab
    grant greet guarantee guess guide handle hang hate head heal hide hire hit honour hope hurry hurt identify ignore
    imagine implement import impose impress improve increase indicate inform initiate inquire inspect install insure
    integrate intend interpret introduce invest investigate invite invoice issue join judge jump justify kill kiss knock
    lack land last laugh launch lend lie lift light limit link load locate lock log love maintain manage mark marry
    matter maximise maximize measure measurement mention mind minimise minimize miss mix modify monitor multiply name
    negotiate note notice notify object observe obtain occur operate oppose organise organize owe park participate
    perform permit phone pick place plan plant please point post practise predict prefer prepare present press prevent
    print proceed process produce promise promote protect prove publish purchase push put query quit raise rank rate react
    realise realize reapply rebook receive recharge recognise recognize recommend record recover redeem redo reduce refer
    reflect refuse regard register regret reject relate relax release rely remind rename renew rent repair repeat replace
    reply represent reschedule research reserve reset resolve respond rest restart restore restrict retain retire retrieve
    retry return reveal reverse review ride ring rise risk run rush save say scan schedule score search secure seek seem
    select separate settle shake share shift ship shout show shut sign sing skip sleep smile sort sound spell split spot
    spread stand state steal stick store stretch study submit subscribe substitute subtract succeed suffer suit supply
    support suppose surprise surround survive suspect suspend swap swim switch talk taste teach tend terminate test thank
    throw tie top topping touch trace track trade train translate treat trigger trust turn type unblock unfreeze unlock
    update upgrade upload validate vary verify view visit void vote wake want warn wash waste watch wear win wish withdraw
    wonder worry wrap yell isn't doesn't didn't wasn't aren't haven't hasn't hadn't won't wouldn't couldn't shouldn't
    weren't isnt doesnt didnt cant wont dont says said seller buyer sender receiver recipient beneficiary payee vendor
    supplier employer employee client clients customers owner holder person's someone's else's extra vacation
    politically cheap places dividends repo sale mode detailed savings' appears shows
    """.split()
)

AMBIGUOUS_NAMES = frozenset(
    """may will mark bill grant rose art frank grace hope joy faith dawn summer april june august young long brown
    green black white gray price page cook king love day bell stone rich dean drew chase hunter miles major guy
    gene pat sue rob jack bob nick ray max ally pearl ruby amber crystal virginia georgia carolina charlotte
    madison jordan austin dallas houston jackson lincoln paris london sydney chelsea victoria florence israel chad
    china asia india america english french west north east south church hill wood woods forest lake park parks
    street rivers ford mills fields banks bush cross case best more little small short bright sharp strong wise
    noble rush holiday christian christmas monday friday mercedes lexus tiffany sky star sunny lane drive ware jan
    mar mai sol sun kong yang ye alpha iris urban pastor old cherry silver beijing christ farmer carpenter baker
    butler fisher taylor potter carter porter turner walker singer salinas santiago
    berlin boston brooklyn savannah cheyenne dakota phoenix denver orlando regina devon kent essex york lancaster
    winchester durham lisbon milan rome roma geneva vienna venezia newton pascal joule celsius fahrenheit dollar
    bond cash buck penny rice pepper basil olive ginger rosemary violet lily ivy daisy poppy angel trinity destiny
    journey genesis heaven harmony melody lyric reed lance blaze rocky rusty sandy stormy misty autumn winter
    mcdonald hilton wendy disney pearson alfredo marriott macy domino nestle heinz kellogg warrior toy master jun jul
    wolf fox bear bird swan crane hawk jay drake finch nightingale fish salmon pike herring lamb bull
    hart stark moody blunt blank frost snow winters waters brook brooks pond marsh glen dale heath moor cliff ridge
    glass steel irons golden diamond sterling gem marble flint slate clay sand rock stones castle temple abbey bishop
    abbot monk pope priest dean deacon knight squire duke earl baron prince princess marshall marshal major sergeant
    cooper sawyer tanner weaver glover shepherd gardener hooker barber chandler spencer archer page bowman
    constable judge law justice power powers read reader wright works holder field meadows orchard hay barley berry
    apple plum peach nut root roots bloom blossom flowers garland wells well spring springs summers freeman newman
    goodman wiseman richman blackman whitehead moon moore world true truth loyal merry gay jolly early late swift
    quick speed sample maker cable tower towers hall halls house houses homes rooms door gates gate key keys locke
    lock post poste mead bacon bean beans curry stew lowe low high english irish scott german welsh holland france
    spain britain england ireland scotland wales brazil mexico peru chile cuba jordan kenya sharma data ion ray beam
    watts watt kelvin volt ohm hertz gauss lord mercer marks bills francs franc pounds sterling bits banks cash nova sierra
    tango bravo echo romeo delta papa juliet alexa siri bixby cortana watson gemini
    ariel java ruby perl julia pascal ada eiffel oracle sage django flask celery redis kong puma mustang
    bentley royce audi ferrari porsche ford chevrolet chrysler tesla nissan honda toyota lincoln aston bell boeing
    harley davidson gucci prada chanel dior armani versace nike adidas sony philips siemens bosch nelson
    mozart washington jefferson monroe kennedy carson lima trent como nice tours troy memphis athens sparta
    florence lourdes guadalupe mercy pilar concepcion asuncion soledad paz cruz santos santo angeles rosario
    del van von der den los las el la le da di de du bin ben mac san don dan ad al an ane are can do go ho in mi my no
    so to per sun van many mata era era lara may an so sol rio ria mina zen son sen ten men hai
    bar bay bit cap dot gap hat hub jam jet kit lap lot map mat net nut pad pan pen pet pin pot rod rug set sir tag
    tan tin ton top van vet via ace ash bee blue boo chi chip colt core cory dash don duke
    eve fay flo flora gale gem gil golda hero honor jet jewel lark leaf lee legend lex link lux major maxim merit
    minor mo moss neo noel nova oak ocean onyx opal orion peace pax peri port praise promise quest rain raven real rebel
    reign rex rhythm ridge rio river rome rory sage saint sea shade shay sky sol sonnet storm summit sweden tate
    teal thorn tide topaz true unique unity valley vega vesper west wilder win winter wren zen zion
    data able agent battle beach bench blues bolt bread bridge bridges broad camp canon capital case castle chance child
    close cloud coffee coin cole cope cotton couch court credit crew crow crown daily dance dear deal depot dial
    dick draper duck dyer east easter eden edge elder else ends even ever fair falls fast faulkner field finder first flight
    flood floor flower foot found free fresh front gain game garden gas gold good grave great greens ground grow
    guest hand harder harvest head heard heart hearing help hobby hole hood hooks horn hunt image ireland iron job
    kettle kind kitchen knife ladd land last law leader leap lease light lines list live living lock loft lover main
    manner manor march market mate mayer meant minister mint mix money monks mouse much music nail near need new night
    noon page paid pair parish parlor part pay peak pick piece pine pitt plant player plum point pool porch pound press
    pride profit proud public purse quarry race rank raw reach reason record redd rice ride ring rise road rollins
    roman room rose rule rust sadler said sale sales salt saw school score seal search seat sell senior shadow shaw
    ship shoe shore show side sides sign silk skill sleep smart snell snipe soul sound south speaker spot staff stamp
    stand starr state steed step stock store strange street sugar sweet table tall tax tear tennis terry thing thou
    tide time toll torres touch tree trial trip truck truss tune upton usher vale vest vine wade wage wait walk wall
    war ward warm water way weeks wheat wheel whole wide wine winner wire wish wolf word wyatt yard year years
    """.split()
)
"""Names that are words too: alone they prove nothing, and elsewhere they are replaced only as they were written."""

_MORE_FIRST_NAMES = frozenset(
    """ava mia luna aria camila layla zoe nora riley aurora hazel stella maya naomi elena leah willow
    isla liam noah elijah oliver ezra mateo leo kai asher silas jayden mason ethan aiden omar yusuf
    mohamed mohammed muhammad ahmed ali hassan ibrahim fatima aisha yara amir khalid raj ravi priya arjun aarav
    ananya sanjay deepa wei mei lin jun ming hiroshi yuki daiki kenji sakura haruto ivan olga dmitri svetlana
    natasha igor sergei carlos juan jose diego mateus joao bjorn lars sven harper kevin brian karen nicole
    """.split()
)
"""Common first names of several countries that Faker's lists of those countries lack."""

NO_LAST_NAME = frozenset(
    """airport airlines airways avenue street road drive lane boulevard beach bay city county state university college
    school hospital center centre park hotel river lake island mountain valley station bank inc corp llc ltd
    company group street st united national international general county january february march april may june
    july august september october november december monday tuesday wednesday thursday friday saturday sunday hills
    heights springs falls church museum bridge square court garden gardens theater theatre stadium arena hall tower
    castle palace cathedral institute foundation prize award awards index festival orchestra band records studios
    pictures entertainment games motors foods stores market cafe restaurant grill kitchen bar pizza inn suites resort
    casino mall plaza terminal port harbor sea ocean canal creek canyon desert forest beach coast peninsula province
    district region republic kingdom empire dynasty war battle treaty act law theorem equation constant number ratio
    distribution test formula rule scale unit units method algorithm syndrome disease hospital clinic pharmacy insurance
    airlines railway railways express newspaper times post magazine news sunday day eve tx ca ny fl il pa az nc co wa
    principle paradox hypothesis conjecture series transform function musical odyssey subdistrict shop barber salon
    city's texas california florida york
    """.split()
)
"""A run of capitals that holds one of these names a thing or a place."""


@functools.cache
def first_names() -> frozenset[str]:
    """First names that prove a person alone, unless they are in `AMBIGUOUS_NAMES`."""
    from faker.providers.person import ja_JP, zh_CN

    # Chinese names of one word stand first or last.
    romanized = (
        *zh_CN.Provider.first_romanized_names,
        *zh_CN.Provider.last_romanized_names,
        *ja_JP.Provider.first_romanized_names,
    )
    return _listed("first_name", _CORE) | _MORE_FIRST_NAMES | {name.casefold() for name in romanized if len(name) > 1}


@functools.cache
def last_names() -> frozenset[str]:
    """Last names that prove a person after a first name, or alone where no other word stands beside them."""
    from faker.providers.person import ja_JP, zh_CN

    romanized = (*zh_CN.Provider.last_romanized_names, *ja_JP.Provider.last_romanized_names)
    return _listed("last_name", _CORE_LAST) | {name.casefold() for name in romanized}


@functools.cache
def all_names() -> frozenset[str]:
    """First and last names of every locale, for places where a name is expected."""
    from faker.providers import person

    locales = [module.name for module in pkgutil.iter_modules(person.__path__) if module.name != "en"]
    return _listed("first_name", locales) | _listed("last_name", locales) | first_names() | last_names()


@functools.cache
def places() -> frozenset[str]:
    """Words of the names of cities, countries and states: alone they are no person."""
    from faker.providers.address import en_US
    from faker.providers.geo import Provider as Geo

    names: Iterable[str] = (
        *(place for _, _, place, _, _ in Geo.land_coords),
        *en_US.Provider.countries,
        *en_US.Provider.states,
        *(
            "Europe",
            "Asia",
            "Africa",
            "America",
            "Antarctica",
            "Oceania",
            "USA",
            "UK",
            "EU",
            "England",
            "Scotland",
            "Wales",
        ),
    )
    return frozenset(name.casefold() for name in names)


@functools.cache
def us_cities() -> tuple[str, ...]:
    """Cities of the United States of one word, as they are written."""
    from faker.providers.geo import Provider as Geo

    return tuple(sorted({place for _, _, place, country, _ in Geo.land_coords if country == "US" and place.isalpha()}))


@functools.cache
def common_words() -> frozenset[str]:
    """Frequent words of English and of business, lower case: no names where nothing else says so."""
    from faker.providers.color import Provider as Color
    from faker.providers.company import en_US as company
    from faker.providers.job import en_US as job
    from faker.providers.lorem import en_US as lorem

    phrases = (
        *lorem.Provider.word_list,
        *job.Provider.jobs,
        *Color.all_colors,
        *(word for words in company.Provider.bsWords for word in words),
        *(word for words in company.Provider.catch_phrase_words for word in words),
    )
    words = {word for phrase in phrases for word in re.findall(r"[a-z']+", phrase.casefold())}
    return frozenset(words) | _COMMON_WORDS | _VERBS | PLAIN_WORDS


def _listed(which: str, locales: Iterable[str]) -> frozenset[str]:
    names: set[str] = set()
    for locale in locales:
        provider = importlib.import_module(f"faker.providers.person.{locale}").Provider
        for attribute in dir(provider):
            if attribute.startswith(which):
                listed = getattr(provider, attribute)
                # Some lists carry frequencies, and some names stand next to functions of the same prefix.
                names.update(listed if isinstance(listed, list | tuple | dict) else ())
    written = {name.casefold() for name in names if isinstance(name, str) and name.isalpha() and len(name) > 1}
    return frozenset(written | {_without_accents(name) for name in written})


def _without_accents(name: str) -> str:
    """As it is written where the keyboard has no accents: kov\u00e1cs -> kovacs."""
    return "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
