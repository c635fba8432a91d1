"""Everything the demo's customers say, by season: phrase templates and person names gathered into one Phrasebook each.

A message is an opener, a problem (problems.py), a mention of the order, details of the item, and a closer; the closer alone
says how urgent it is. No template and no name is in both seasons; the fresh templates recombine captured words. Knows
nothing of order ids, product codes or LLM calls. All text is invented.
"""

from dataclasses import dataclass
from typing import Literal

from jobs.demo.problems import CAPTURED_PROBLEMS, FRESH_PROBLEMS

Season = Literal["captured", "fresh"]


@dataclass(frozen=True)
class Phrasebook:
    """All templates and names of one season; keys are intents, urgencies, or the values a template mentions."""

    problems: dict[str, tuple[str, ...]]
    openers: dict[str, tuple[str, ...]]
    mentions: dict[str, tuple[str, ...]]
    details: dict[str, tuple[str, ...]]
    closers: dict[str, tuple[str, ...]]
    first_names: tuple[str, ...]
    last_names: tuple[str, ...]


def _lines(text: str) -> tuple[str, ...]:
    return tuple(text.strip().split("\n"))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PRODUCT_LINES = _words("""
Ridgeline Summit Cascade Tundra Granite Juniper Meridian Lakeshore Borealis Canyon Glacier Timberline Pinecrest Skyward
Wayfinder Northwind Driftwood Foxtail Highland Stonepath Thunderhead Larkspur Cinder Everfrost""")
WEARABLES = _words("jacket parka vest anorak poncho fleece hoodie")
GEAR = WEARABLES + _words("backpack daypack tent duffel hammock tarp bivvy")
"""A product is a line and a kind of gear ("Ridgeline tent"); which pairs a season may use, the world decides."""


CAPTURED_FIRST_NAMES = _words("""
Mara Tobias Ingrid Rafael Yusuf Noor Camille Dimitri Hana Oskar Priya Gideon Leila Marcus Saoirse Emil Freya Kofi Anneliese
Bruno Celeste Darius Elena Farid Greta Hugo Imani Jonas Katya Lorenzo Mei Nikhil Odette Pavel Quentin Rosalind Stefan Tamsin
Ulrich Vera Wanda Xavier Yvonne Zoltan Adele Bashir Corinne Diego Esther Fabian Gloria Hassan Irene Joaquin Keiko Lucas Miriam
Nadia Otto Petra Ramon Sabine Tariq Ursula Viktor Winston Ximena Yara Zainab Alistair Beatrix Cyrus Delphine Edgar Fiona
Gustav Helena Ivan Jasmine Kenji Lydia Mateo Nolan Ophelia Pascal Renata Silas Thea Uriel Valentina Walter Yasmin Zachary Amara
Benedict Carmen Dorian Edith Felix Georgia Hector Isolde Julian Kamila Leopold Magnus Naomi Oliver Paloma Ruben Sylvie Theo
Vincent Willa Anton Blanca Conrad Dagny Ellis Flora""")

CAPTURED_LAST_NAMES = _words("""
Lindqvist Okafor Castellano Petrov Nakamura Hargreaves Delacroix Mbeki Thorsen Alvarado Brennan Choudhury Dvorak Eriksen
Fontaine Galloway Haddad Ibarra Jankowski Kowalczyk Larsson Moreau Novak Oyelaran Pellegrini Quigley Rasmussen Santoro Takeda
Underwood Vasquez Whitaker Yamamoto Zielinski Abernathy Bianchi Calloway Donovan Espinoza Fitzgerald Gallagher Holloway Iversen
Jorgensen Kapoor Lombardi Maddox Nilsson Ortega Pemberton Ramirez Sinclair Tanaka Ulloa Valdez Weatherby Yilmaz Zamora Ashworth
Beaumont Carmichael Desrosiers Ekwueme Ferreira Grimaldi Henriksen Ivanova Jimenez Kessler Lafontaine Mancini Nordstrom
Oliveira Prescott Rosenthal Schroeder Thackeray Urbina Villanueva Wojcik Yeboah Zapata Aldridge Bancroft Cavendish Drummond
Eastwick Faulkner Goldberg Huxley Ishikawa Jaramillo Kensington Langley Montague Nightingale Osborne Pritchard Redmond
Silverman Templeton Upton Vandermeer Winslow Yates Zeller Atherton Blackwood Crawford Dunmore Ellsworth Farnham Goodwin
Hollander Kirkland Lockhart Merrick Norwood Pendleton""")

FRESH_FIRST_NAMES = _words("""
Astrid Bilal Clara Damien Eloise Franco Giselle Henrik Ilse Jamal Kirsten Lionel Monika Neville Olga Percival Quincy Rhea
Samir Tessa Umberto Violet Wendell Yolanda Zara Abel Bettina Cedric Daphne Emilio Fatima Gareth Harriet Ismail Judith Klaus
Lorena Milan Nerys Orson Philippa Ravi Simone Tomas Una Vikram Wilhelmina Yael Zora Agnes Boris Cosima Dominic Evelyn Florian
Gwendolyn Humphrey Ines Jerome Karina Lars Margot Nestor Oona Piotr Regina Sergio Tatiana Ulysses Veronica Wolfgang Yuki Zelda
Andres Brigitte Caspian Dolores Everett Felicity Gunnar Hilda Igor Josephine Kieran Lucinda Maurice Nina Olaf Penelope Roland
Sofia Timothy Uma Vaughn Winifred Yannick Zeno Alma Bertrand Cecilia Desmond Elspeth Fergus Gemma Horatio Isabel Jorge Kendra
Luther Matilda Nathaniel Octavia Rupert Stella Trevor Viola Warren Adriana Basil Claudette Duncan Estelle""")

FRESH_LAST_NAMES = _words("""
Achterberg Baptiste Cordero Dimitrov Engstrom Fairbanks Guerrero Hathaway Inoue Jacobsen Kaminski Lundgren Matsuda Nwosu
Oconnell Papadakis Quintero Rutherford Salvatore Trevino Uchida Venter Westbrook Yoshida Zimmerman Arsenault Bergstrom Coleridge
Dubois Escobar Falkenberg Gutierrez Hawthorne Illescas Johansson Kovacs Leclerc Mendoza Nakagawa Obrien Pacheco Rinaldi
Stanhope Thornbury Urquhart Vermeulen Wadsworth Yancey Zhukov Appleby Bradshaw Covington Davenport Edgeworth Featherstone
Grantham Hemsworth Isaksen Jovanovic Kingsley Lancaster Middleton Navarro Orlando Pickering Radcliffe Somerset Tillman Unwin
Vickers Wetherell Yarrow Ziegler Almeida Bellweather Chambers Dankworth Ellington Foxworth Gainsborough Harrington Imamura
Jellicoe Kitagawa Lattimore Marchetti Norrington Oldfield Partridge Ravenscroft Sandoval Tremblay Umana Valentino Wakefield
Yokoyama Zambrano Ainsworth Bellamy Carrington Dashwood Everly Fairfax Granville Hollingworth Ingersoll Jessup Kipling Lovelace
Musgrave Northcott Overstreet Pembroke Rockwell Standish Thurlow Vanhorn Whitfield Winterbourne""")

PHRASEBOOKS: dict[Season, Phrasebook] = {
    "captured": Phrasebook(
        problems=CAPTURED_PROBLEMS,
        openers={
            "name": _lines("""
Hi, this is {name}.
Hello, my name is {name}.
{name} here.
Good morning, {name} here.
Hi, I am {name}.
Hello, {name} speaking.
Good evening, this is {name}.
Dear team, I am {name}.
Hey, my name is {name}.
Hello, I am {name}.
My name is {name}.
This is {name} writing."""),
            "": _lines("""
Hi.
Hello.
Good morning.
Hi there.
Hello team.
Dear team.
Good evening.
Hey.
Hello there, a question.
Hi, I need help."""),
        },
        mentions={
            "order_id": _lines("""
My order number is {order_id}.
Order {order_id}.
The order is {order_id}.
It is about order {order_id}.
Order number: {order_id}.
This concerns order {order_id}.
The number of my order is {order_id}.
My order: {order_id}.
I have order {order_id}.
The reference is {order_id}.
Reference {order_id}.
You will find it under {order_id}.
The confirmation says {order_id}.
See order {order_id}."""),
            "order_id and email": _lines("""
Order {order_id}, account {email}.
My order is {order_id} and my email is {email}.
The order {order_id} is under {email}.
Email {email}, order {order_id}."""),
            "email": _lines("""
My account email is {email}.
I ordered with {email}.
You can find me under {email}.
My order is under my email {email}.
The email on the order is {email}.
Please look under {email}."""),
            "": _lines("""
I do not have the order number here.
I cannot find my order number.
The order number is lost.
I deleted the confirmation email."""),
        },
        details={
            "product_code and quantity": _lines("""
I bought {quantity} of item {product_code}.
It is {quantity} x {product_code}.
Item {product_code}, {quantity} pieces.
Product code {product_code}, quantity {quantity}.
That is {quantity} pieces of {product_code}.
Item code {product_code}, {quantity} in total."""),
            "product_code": _lines("""
The item code is {product_code}.
Item {product_code}.
Product code {product_code}.
The label says {product_code}.
The code is {product_code}.
It is item {product_code}."""),
            "quantity": _lines("""
I bought {quantity} of them.
The order has {quantity} of them.
Quantity {quantity}.
There are {quantity} in total.
I have {quantity} pieces.
I ordered {quantity} of these."""),
            "": ("",),
        },
        closers={
            "high": _lines("""
I need this solved today.
This is urgent, please hurry.
We leave tomorrow morning.
Please act right away.
I need an answer immediately.
It is an emergency.
Please help as soon as possible.
Our trip starts tomorrow.
I need it by tonight.
This cannot wait, please hurry."""),
            "normal": _lines("""
Thanks for your help.
Thank you very much.
Please let me know.
Thanks a lot.
Many thanks to you.
I look forward to your answer.
What can you do?
Please help me with this.
With kind regards.
Thank you for looking into it."""),
            "low": _lines("""
There is no rush.
No hurry at all.
Take your time.
Whenever you have a moment.
This is not urgent.
Any day next month is fine.
It can wait a while.
Answer whenever it suits you.
No need to hurry.
I am in no rush."""),
        },
        first_names=CAPTURED_FIRST_NAMES,
        last_names=CAPTURED_LAST_NAMES,
    ),
    "fresh": Phrasebook(
        problems=FRESH_PROBLEMS,
        openers={
            "name": (
                "Hello, this is {name}.",
                "Good morning, I am {name}.",
                "Hi, {name} here.",
                "Hey, this is {name}.",
            ),
            "": ("Hi team.", "Hey there.", "Good evening team.", "Hello, I need help."),
        },
        mentions={
            "order_id": _lines("""
My order is {order_id}.
This is about order {order_id}.
The order number is {order_id}.
You will find my order under {order_id}.
The reference of my order is {order_id}."""),
            "order_id and email": ("My email is {email}, order {order_id}.", "Order {order_id} is under {email}."),
            "email": ("My email is {email}.", "The order is under {email}.", "Please find me under {email}."),
            "": ("I cannot find the confirmation email here.", "I do not have my order number."),
        },
        details={
            "product_code and quantity": _lines("""
It is {quantity} pieces of {product_code}.
I ordered {quantity} of item {product_code}.
Item code {product_code}, quantity {quantity}."""),
            "product_code": (
                "The product code is {product_code}.",
                "Item code {product_code}.",
                "It says {product_code}.",
            ),
            "quantity": (
                "I ordered {quantity} of them.",
                "There are {quantity} pieces.",
                "I bought {quantity} in total.",
            ),
            "": ("",),
        },
        closers={
            "high": _lines("""
I need an answer today.
This is an emergency, please hurry.
Our trip starts tomorrow morning.
I need this solved immediately."""),
            "normal": _lines("""
Thank you for your help.
Many thanks for looking into it.
Please let me know, many thanks.
Thanks, kind regards."""),
            "low": ("There is no hurry.", "No rush at all.", "It is not urgent.", "This can wait a while."),
        },
        first_names=FRESH_FIRST_NAMES,
        last_names=FRESH_LAST_NAMES,
    ),
}
