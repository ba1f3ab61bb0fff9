"""Questions about a room in free wording, with computed answers: the templates, and what makes them true.

None of the templates is a question of `paraphrases.jsonl`, which `free_questions.py` asks after training.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, pairwise, product
from typing import Any

import numpy as np

from spa3r.rooms import COLORS, FURNITURE, RoomWalk

Turn = tuple[str, str]

REFUSAL = "I can only answer questions about this room."
"""The answer to everything else."""

CLEARLY = 1.2
"""Factor by which a length must differ from another for a comparison."""

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

OPENINGS = (
    "Please tell me: ",
    "Quick question: ",
    "I wonder, ",
    "Tell me, ",
    "Looking at these pictures, ",
    "From the pictures, ",
    "Well, ",
    "So, ",
    "OK, ",
    "One more thing: ",
    "Hi, ",
    "Now, ",
)
"""What may come before a question."""

COUNT = """\
How many {as} are there?
How many {as} are in the room?
How many {as} are in this room?
How many {as} do you see?
How many {as} can you see?
How many {as} does this room have?
How many {as} are visible?
How many {as} have you seen on the way?
How many {as} do you find in the pictures?
Count the {as}.
Count all the {as}, please.
Can you count the {as}?
Could you count how many {as} there are?
Could you tell me how many {as} there are?
Do you happen to know the number of {as}?
Give me the number of {as}.
Tell me how many {as} you see.
Tell me the number of {as} in the room.
What is the number of {as}?
What number of {as} do you see?
What is the count of {as} here?
I want to know the number of {as}.
I would like to know how many {as} you can find.
How many pieces of furniture here are {as}?
The {as}, how many are they?
The number of {as} is what?
Find all {as} and count them.
Report the total of {as}.
Is it possible to say how many {as} we have here?
How many {as} did the camera pass?
""".splitlines()

METERS = """\
How far is the {a} from the {b}?
How far is it from the {a} to the {b}?
How far apart are the {a} and the {b}?
How far away is the {a} from the {b}?
How many meters is the {a} away from the {b}?
How many meters are between the {a} and the {b}?
How many meters lie between {a} and {b}?
What is the distance between the {a} and the {b}?
What is the distance from the {a} to the {b} in meters?
What's the distance between {a} and {b}?
Distance between the {a} and the {b}, please.
Give me the distance from the {a} to the {b}.
Tell me how far the {a} is from the {b}.
Tell me the distance of the {a} to the {b}.
Measure the distance from the {a} to the {b}.
Can you estimate the distance between the {a} and the {b}?
Could you tell me how far the {b} is from the {a}?
How wide is the space between the {a} and the {b}?
How large is the gap from the {a} to the {b}?
How much distance is there from the {a} to the {b}?
How long is the way from the {a} to the {b}?
I want to walk from the {a} to the {b}. How far is that?
I am next to the {a}. How far do I have to go to the {b}?
In meters, how far is the {a} from the {b}?
About how far is it between the {a} and the {b}?
From the {a} to the {b}, what is the distance?
The distance of {a} and {b} is how many meters?
What length of tape do I need between the {a} and the {b}?
Estimate the distance of the {a} from the {b} in meters.
Would you say how far the {a} stands from the {b}?
""".splitlines()

CENTIMETERS = """\
How big is the {a}?
How large is the {a} in centimeters?
How long is the {a}?
How long is the longest side of the {a}?
How many centimeters long is the {a}?
How many cm is the {a}?
What is the size of the {a}?
What is the length of the {a} in centimeters?
What's the size of the {a} in cm?
What is the longest dimension of the {a}?
What is the largest dimension of the {a} in centimeters?
What does the {a} measure?
What are the measurements of the {a}?
Give me the length of the {a}.
Tell me the size of the {a}.
Tell me how big the {a} is.
Tell me how long the {a} is in centimeters.
Size of the {a}?
Size of the {a}, in cm, please.
Measure the {a}.
Can you measure the longest side of the {a}?
Could you tell me how large the {a} is?
Estimate the size of the {a}.
Estimate the longest edge of the {a} in centimeters.
I need the size of the {a}.
I want to know how big the {a} is.
The {a} is how many centimeters long?
In centimeters, how long is the {a}?
How much does the {a} measure at its longest side?
What is the maximum extent of the {a}?
How wide or high is the {a}, whichever is more?
What is the biggest measure of the {a}?
""".splitlines()

SQUARE_METERS = """\
What is the size of this room?
What is the size of the room?
What's the size of this room in square meters?
How big is the room?
How big is this room?
How large is the room in square meters?
How many square meters is this room?
How many square meters does this room measure?
What is the area of this room?
What is the area of the floor?
What is the floor area of the room?
What's the area of the room in square meters?
Area of this room?
Give me the area of the room.
Give me the size of this room.
Tell me how big this room is.
Tell me how large the floor is.
Tell me the area of this room in square meters.
Can you estimate the size of the room?
Could you tell me how many square meters there are?
Could you say how large this room is?
Estimate the floor area.
Estimate how big the room is.
I want to know the size of the room.
I need to know how large the room is, in square meters.
How much space is in this room?
How much floor space does the room have?
How much floor area do we have here?
In square meters, how big is the room?
Size of the room?
The room has how many square meters?
What is the total floor space?
I want to buy a carpet for the whole room. How large must it be?
How many square meters of tiles does the floor need?
How spacious is this room?
What is the extent of the floor?
""".splitlines()

NEAREST = """\
Which is closer to the {d}, the {a} or the {b}?
Which is nearer to the {d}: the {a} or the {b}?
Which of the two is closer to the {d}, the {a} or the {b}?
What is nearer to the {d}, the {a} or the {b}?
What is closer to the {d}: {a} or {b}?
Is the {a} or the {b} closer to the {d}?
Which one is closest to the {d}: the {a}, the {b} or the {c}?
Which is the closest to the {d}, {a}, {b} or {c}?
Which of these is nearest to the {d}: {a}, {b}, {c}?
Which of the {a}, the {b} and the {c} is closest to the {d}?
Which object is closest to the {d}: the {a}, the {b} or the {c}?
What is the nearest object to the {d}, the {a}, the {b} or the {c}?
What is nearest to the {d}, {a}, {b} or {c}?
Tell me which is closer to the {d}, the {a} or the {b}.
Tell me what is nearest to the {d}: the {a}, the {b}, the {c}.
Name the closest to the {d}: {a}, {b} or {c}.
Choose the object closest to the {d}: {a}, {b}, {c}.
Out of {a}, {b} and {c}, which is the closest to the {d}?
Of {a} and {b}, which is closer to the {d}?
Of the {a} and the {b}, what stands nearer to the {d}?
Among the {a}, the {b} and the {c}, which one is nearest to the {d}?
Which has the smaller distance to the {d}, the {a} or the {b}?
Which one has the shortest distance to the {d}, the {a}, the {b} or the {c}?
I am at the {d}. Is the {a} closer or the {b}?
I am at the {d}. Which is nearer, the {a} or the {b}?
Starting at the {d}, which is closer: the {a}, the {b} or the {c}?
Standing at the {d}, do I reach the {a} or the {b} sooner?
Between {a} and {b}, which is nearer to the {d}?
Compare the {a} and the {b}: which is closer to the {d}?
Does the {a} or the {b} stand closer to the {d}?
""".splitlines()

DIRECTION = """\
I am standing by the {a} and facing the {b}. Where is the {c}?
I stand at the {a} and face the {b}. Is the {c} on my left or on my right?
I am at the {a}, looking at the {b}. On which side is the {c}?
If I stand by the {a} and face the {b}, where is the {c}?
If I stand next to the {a} and look at the {b}, is the {c} left or right?
If I am by the {a} and I look towards the {b}, in which direction is the {c}?
If you stand at the {a} and face the {b}, on which side of you is the {c}?
When I stand at the {a} facing the {b}, is the {c} to my left or right?
When I look from the {a} to the {b}, where is the {c}?
Seen from the {a} facing the {b}, where is the {c}?
Seen from the {a} towards the {b}, is the {c} to the left or to the right?
From the {a}, facing the {b}, which side is the {c} on?
From the {a} with a view of the {b}, where do I see the {c}?
Standing at the {a} and facing the {b}, where is the {c}?
Standing by the {a}, looking at the {b}, is the {c} left or right of me?
Being at the {a} and turned to the {b}, where do I have the {c}?
You are at the {a} and look at the {b}: where is the {c}?
You stand by the {a} facing the {b}. Tell me the direction of the {c}.
Imagine you are at the {a} and face the {b}. Where is the {c}?
Imagine me at the {a}, facing the {b}: is the {c} on the left or on the right?
Suppose I stand at the {a} and look towards the {b}. Which way is the {c}?
Tell me where the {c} is when I am at the {a} and face the {b}.
Is the {c} on the left or the right if I look from the {a} to the {b}?
Is the {c} left or right when I go from the {a} to the {b}?
In which direction is the {c} for someone at the {a} who faces the {b}?
On which side is the {c} when one stands at the {a} and looks at the {b}?
Which way do I have to turn at the {a}, facing the {b}, to look at the {c}?
I walk from the {a} towards the {b}. On which side is the {c}?
I walk from the {a} to the {b}. Is the {c} left or right?
Where is the {c}, seen from the {a} in the direction of the {b}?
""".splitlines()

IS_THERE = """\
Is there a {a}?
Is there a {a} in the room?
Is there a {a} in this room?
Is there a {a} here?
Is there any {a} in the room?
Is there at least one {a}?
Is a {a} in the room?
Is a {a} to be seen?
Are there any {as}?
Are there any {as} in this room?
Are {as} in the room?
Do you see a {a}?
Do you see any {as}?
Can you find a {a}?
Can you see any {as} in the pictures?
Can one see a {a} here?
Does the room have a {a}?
Does the room contain a {a}?
Does this place have any {as}?
Do the pictures show a {a}?
Do we have a {a} here?
Did you see a {a}?
Did you find any {as}?
Have you seen a {a}?
Has this room got a {a}?
Was there a {a} in the pictures?
Will I find a {a} in this room?
Would you see a {a} here?
Could there be a {a} in this room?
Tell me if there is a {a}.
Tell me whether you see a {a}.
A {a} is in the room, isn't it?
I think there is a {a}. Is that right?
Is it right that the room has a {a}?
Does anyone here have a {a}?
""".splitlines()

IS_LEFT = """\
Is the {a} left of the {b}?
Is the {a} on the left side of the {b}?
Is the {a} on the {b}'s left?
Is the {a} further left than the {b}?
Is the {a} to the left side of the {b}?
Does the {a} stand on the left of the {b}?
Can I find the {a} left of the {b}?
Do you see the {a} to the left of the {b}?
""".splitlines()
"""Seen from the first picture."""
IS_RIGHT = [template.replace("left", "right") for template in IS_LEFT]

IS_CLOSER_TO = """\
Is the {a} nearer to the {b} than to the {c}?
Does the {a} stand closer to the {b} than to the {c}?
Does the {a} stand nearer to the {b} than to the {c}?
Is it closer from the {a} to the {b} than to the {c}?
Is the distance from the {a} to the {b} smaller than to the {c}?
Is the {b} closer to the {a} than the {c} is?
""".splitlines()
IS_CLOSER_THAN = """\
Is the {a} closer to the {b} than the {c}?
Is the {a} nearer to the {b} than the {c}?
Is the {a} closer to the {b} than the {c} is?
Is the {b} nearer to the {a} than to the {c}?
Does the {a} stand closer to the {b} than the {c}?
Is the way from the {a} to the {b} shorter than from the {c}?
""".splitlines()

IS_BIGGER = """\
Is the {a} larger than the {b}?
Is the {a} longer than the {b}?
Is the {a} a bigger thing than the {b}?
Is the size of the {a} more than that of the {b}?
Does the {a} have a longer side than the {b}?
Do you think the {a} is bigger than the {b}?
Can you say if the {a} is bigger than the {b}?
Are the dimensions of the {a} larger than those of the {b}?
""".splitlines()
IS_SMALLER = """\
Is the {a} shorter than the {b}?
Is the {a} a smaller thing than the {b}?
Is the size of the {a} less than that of the {b}?
Do you think the {a} is smaller than the {b}?
Can you say whether the {a} is smaller than the {b}?
Would the {a} be the smaller one compared with the {b}?
""".splitlines()

IS_APART = """\
Is the {a} more than {n} from the {b}?
Is the {a} more than {n} away from the {b}?
Are the {a} and the {b} farther apart than {n}?
Is the distance between the {a} and the {b} more than {n}?
Is it more than {n} from the {a} to the {b}?
Are there more than {n} between the {a} and the {b}?
Do the {a} and the {b} have a distance of over {n}?
""".splitlines()
IS_WITHIN = """\
Is the {a} less than {n} from the {b}?
Is the {a} less than {n} away from the {b}?
Are the {a} and the {b} less than {n} apart?
Is the distance from the {a} to the {b} below {n}?
Is the distance between the {a} and the {b} under {n}?
Does the {a} stand within {n} of the {b}?
""".splitlines()
IS_FAR = """\
Is the {a} far away from the {b}?
Is it far from the {a} to the {b}?
Is there a long way between the {a} and the {b}?
Are the {a} and the {b} far apart?
Does the {a} stand far from the {b}?
Is the distance between the {a} and the {b} large?
""".splitlines()
"""Farther than three meters."""
IS_NEAR = """\
Is the {a} near the {b}?
Is the {a} close to the {b}?
Is the {a} beside the {b}?
Is the {a} right by the {b}?
Are the {a} and the {b} near each other?
Are the {a} and the {b} next to each other?
Does the {a} stand next to the {b}?
Do the {a} and the {b} stand close to each other?
""".splitlines()
"""Nearer than one meter."""

MORE_THAN = """\
Are there more {as} than {bs} in the room?
Do you see more {as} than {bs}?
Is the number of {as} larger than that of {bs}?
Does the room have more {as} than {bs}?
Are the {as} more than the {bs}?
""".splitlines()
AT_LEAST = """\
Are there {n} or more {as}?
Are there at least {n} {as} in the room?
Do you see at least {n} {as}?
Does the room have {n} {as} or more?
Can you count at least {n} {as}?
""".splitlines()
SEVERAL = """\
Are there several {as}?
Are there two or more {as} in here?
Do you see more than one {a}?
Does the room have more than one {a}?
Is there a second {a}?
""".splitlines()
EXACTLY_ONE = """\
Is there exactly one {a}?
Is there only one {a}?
Is there just a single {a} here?
Do you see only one {a}?
Does the room have exactly one {a}?
""".splitlines()

IS_COLOR = """\
Is the color of the {a} {color}?
Is the {a} painted {color}?
Is the {a} a {color} one?
Is {color} the color of the {a}?
Is it true that the {a} is {color}?
Does the {a} look {color}?
Do you see that the {a} is {color}?
Would you call the {a} {color}?
Can you confirm that the {a} is {color}?
Was the {a} {color}?
The {a} is {color}, isn't it?
""".splitlines()
IS_THERE_COLORED = """\
Is there a {color} {a}?
Do you see a {color} {a}?
Is a {color} {a} in the room?
Does the room have a {color} {a}?
Can you find a {color} {a} here?
""".splitlines()

IS_ROOM_LARGER = """\
Is this room larger than {n} square meters?
Is the room bigger than {n} square meters?
Does the room have more than {n} square meters?
Is the area of the room above {n} square meters?
Are there more than {n} square meters of floor?
Is the floor area more than {n} square meters?
""".splitlines()
IS_LONGER_THAN = """\
Is the {a} larger than {n}?
Is the length of the {a} above {n}?
Is the {a} more than {n} long?
Does the {a} measure more than {n}?
Is the longest side of the {a} over {n}?
""".splitlines()

FIRST = """\
Which appears first, the {a} or the {b}?
Which appears first, the {a}, the {b} or the {c}?
Which of the {a} and the {b} appears first?
Which comes first, the {a} or the {b}?
Which do you see first, the {a} or the {b}?
Which do you see first: the {a}, the {b} or the {c}?
Which one is seen first: {a} or {b}?
Which is shown first in the pictures, {a}, {b} or {c}?
Which is visible earlier, the {a} or the {b}?
Which object was the first to appear: {a}, {b} or {c}?
What comes first in the pictures: the {a} or the {b}?
What appears earlier, the {a} or the {b}?
What is seen first, {a}, {b} or {c}?
What was visible first, the {a} or the {b}?
Do the pictures show the {a} or the {b} first?
Do you see the {a} or the {b} earlier?
Does the {a} or the {b} appear first?
Is the {a} or the {b} seen first?
Was the {a} or the {b} shown earlier?
Tell me which came first, the {a} or the {b}.
Tell me what appears first: {a}, {b} or {c}.
Of {a}, {b} and {c}, which appears first?
Name the one that you see first: {a} or {b}.
Going from picture to picture, which do I meet first, the {a} or the {b}?
""".splitlines()
ORDER = """\
In what order do the {a}, the {b} and the {c} appear?
In what order do you see the {a}, the {b} and the {c}?
In which order are {a}, {b} and {c} seen?
In which order do the pictures show the {a}, the {b} and the {c}?
What is the order of appearance of {a}, {b} and {c}?
What is the order in which {a}, {b}, {c} appear?
What is the order in which you met {a}, {b} and {c}?
Give me the order of appearance: {a}, {b}, {c}.
Give the order in which the {a}, the {b} and the {c} become visible.
List in order of appearance: {a}, {b}, {c}.
List {a}, {b} and {c} by the time they first appear.
Order these by first appearance: {a}, {b}, {c}.
Put {a}, {b} and {c} in the order in which they appear.
Put these in order of their appearance: the {a}, the {b}, the {c}.
Tell me the order in which the {a}, the {b} and the {c} appear.
Arrange {a}, {b} and {c} in the order in which the pictures show them.
Sort {a}, {b}, {c} by when you see them.
When you go through the pictures, in what order do {a}, {b} and {c} come?
How are {a}, {b} and {c} ordered by their first picture?
Which is the sequence of {a}, {b}, {c} in the pictures?
""".splitlines()

OBJECTS = """\
What do you see?
What is in this room?
What is in the room?
What can you see?
What can you see in this room?
What can be seen here?
What is here?
What is there in this room?
What is visible in the pictures?
What is on these pictures?
What does this room contain?
What does the room have in it?
What do these pictures show?
What do we have in this room?
What things are in the room?
What things are here?
What objects do you see?
What objects are in this room?
What objects can you find?
What furniture is there?
What furniture do you see?
What pieces of furniture are in the room?
What kind of furniture is in this room?
Which objects are in the room?
Which objects do you see?
Which furniture is here?
Which pieces of furniture do you recognize?
Which things are visible?
List the objects.
List the objects in this room.
List all the furniture.
List what you see.
Name the objects in the room.
Name all things that you see.
Name the furniture.
Describe this room.
Describe what you see.
Describe the scene.
Describe the furniture in here.
Tell me what you see.
Tell me which objects are in this room.
Tell me about the room.
Tell me about the furniture.
Show me a list of the furniture.
Give me a list of all objects.
Make a list of the things in the room.
Can you list the furniture?
Can you describe the room?
Can you tell me what is in the room?
Could you name everything that you see?
Could you describe what is here?
I want to know what is in this room.
Enumerate the objects.
Everything in the room, please.
Say what is in this place.
Summarize what the pictures show.
Any furniture? Which?
How is this room furnished?
With what is the room furnished?
Please give an overview of the room.
""".splitlines()

COLOR = """\
What is the color of the {a}?
What is the {a}'s color?
What color has the {a}?
What color does the {a} have?
What color do you see on the {a}?
What color is this {a}?
What colour is the {a}?
Which color is the {a}?
Which color has the {a}?
Which color was used for the {a}?
In which color is the {a}?
In what color is the {a} painted?
Of what color is the {a}?
Tell me what color the {a} is.
Tell me which color the {a} has.
Tell me the {a}'s color.
Name the color of the {a}.
Give me the color of the {a}.
Say the color of the {a}.
Can you tell me the color of the {a}?
Could you say what color the {a} is?
Do you know the color of the {a}?
Do you see which color the {a} has?
I want to know the color of the {a}.
I would like to know what color the {a} has.
The color of the {a}, please.
The {a} has what color?
How is the {a} colored?
How would you describe the color of the {a}?
The {a}: which color?
Describe the color of the {a}.
Color of {a}?
""".splitlines()

OUTSIDE = """\
Who are you?
Who made you?
Who is the owner of this house?
Who is in the room?
Who lived here before?
Who slept here?
Who drew this?
Who is the president?
Who is your best friend?
Who cleans this room?
Who wrote Hamlet?
Who discovered America?
Who invented the telephone?
Who is the best singer?
Who won the election?
What is love?
What is the meaning of life?
What is the news today?
What is the date?
What year is it?
What month is it?
What is your favorite color?
What is your favorite food?
What do you want?
What do you think?
What can you do for me?
What are you doing?
What are you?
What should I wear today?
What should I eat?
What should I do tomorrow?
What is for dinner?
What happened yesterday?
What happened here last night?
What will happen next?
What language do you speak?
What is the address of this house?
What is the rent?
What is the price of this house?
What is the best phone?
What is the speed of light?
What is the fastest animal?
What is the tallest mountain?
What is the longest river?
What is a black hole?
What is gravity?
What is inflation?
What is the square root of nine?
What is the plural of mouse?
What is the opposite of hot?
What sound does a cow make?
What is outside the window?
What is under the floor?
What is in the drawer?
What is on television tonight?
What is in the refrigerator to eat?
What is written on the wall?
What is the name of the owner?
What is the password?
What is the phone number?
What game is this?
What movie should I watch?
What film is this from?
What song is this?
What style of furniture is this?
What kind of music do you like?
What book should I read?
What brand is the furniture?
What wood is this?
What smells so bad?
What noise is that?
What city is this?
What season is it?
What planet do we live on?
What does the text say?
What does the letter say?
What does it mean?
What did you say?
When was the house built?
When were these pictures taken?
When is the next train?
When is Christmas?
When will it rain?
When did the war end?
When do you sleep?
When does the shop open?
When is lunch?
Where are you?
Where am I?
Where is this house?
Where do you live?
Where do you come from?
Where is the nearest restaurant?
Where is my phone?
Where are my keys?
Where is the bathroom in this house?
Where is the exit of the building?
Where is Paris?
Where does the sun rise?
Where can I park my car?
Where should I go on holiday?
Why is the sky blue?
Why are you so slow?
Why is it dark?
Why do birds sing?
Why do we dream?
Why should I trust you?
Why is nobody here?
Why?
How old are you?
How is the weather in Berlin?
How is your day?
How is it going?
How do you do?
How do you work?
How do I get to the station?
How do I cook rice?
How do I learn to play the guitar?
How do I fix a bike?
How do I sleep better?
How do airplanes fly?
How can I make money?
How can I help you?
How can I lose weight?
How expensive is this house?
How much is the rent?
How much is a flight to London?
How much money do you have?
How much do you weigh?
How much sugar is in a cake?
How many days has a year?
How many people are here?
How many friends do you have?
How many legs does a spider have?
How many countries are in Europe?
How many planets are there?
How many floors does the building have?
How many windows does the house have?
How many books do they own?
How many hours are in a week?
How many children live here?
How warm is it in the room?
How noisy is the street?
How high is the mountain?
How far is the moon?
How far is it to the airport?
How long is a football match?
How long does it take to learn French?
How big is the earth?
How big is your family?
How fast is a car?
How deep is the sea?
How do you feel?
Hi.
Hi there!
Hey!
Good morning.
Good evening!
Good night.
Hello, how is it going?
Hello there.
Thanks.
Thanks a lot!
Thank you very much.
Bye.
Bye bye!
Goodbye.
See you later.
Sorry.
Please.
Yes.
No.
OK.
Nice.
Great job!
You are wrong.
You are nice.
I love you.
I am tired.
I am hungry.
I am bored.
I do not understand.
I like it here.
I need help.
I have a question.
Help me!
Stop.
Sing a song.
Sing something for me.
Tell me a story.
Tell me a secret.
Tell me something funny.
Tell me something about history.
Tell me about yourself.
Tell me the time.
Tell me the news.
Tell me about Napoleon.
Tell me how to cook pasta.
Make me a sandwich.
Make a joke.
Do you know a good joke?
Do you know any riddles?
Play some music.
Play a game with me.
Call my mother.
Call the police.
Send an email to my boss.
Order a pizza.
Order a taxi for tomorrow.
Book a table in a restaurant.
Buy me a ticket.
Find me a cheap flight.
Find a good doctor.
Set an alarm for seven.
Set a timer.
Remind me to call Tom.
Open the door.
Open the window, please.
Close the window.
Close the curtains.
Turn off the light.
Turn on the television.
Turn the music down.
Switch off the heating.
Clean the room.
Move the furniture.
Draw a picture of a cat.
Draw the room.
Paint the walls.
Take a photo.
Delete the pictures.
Show me the kitchen of the neighbors.
Show me another house.
Write a story.
Write a song.
Write an email to my teacher.
Write a letter.
Write code that reads a file.
Write a function in Python.
Fix this bug.
Explain quantum physics.
Explain how a motor works.
Explain the rules of chess.
Explain democracy.
Solve the equation.
Solve this riddle.
Calculate my taxes.
Add three and five.
Count to ten.
Spell the word banana.
Give me a recipe for soup.
Give me advice.
Give me money.
Give me a compliment.
Give me the latest news.
Recommend a book.
Recommend a good film.
Guess my age.
Guess what I am thinking.
Repeat after me.
Are you a robot?
Are you human?
Are you happy?
Are you sure?
Are you there?
Are you hungry?
Are you a man or a woman?
Are the neighbors nice?
Are the people rich?
Are there ghosts?
Are there any people?
Are there mice in the house?
Is anybody home?
Is anyone there?
Is someone in the room?
Is there life on Mars?
Is there a cat hiding somewhere?
Is there a dog?
Is there a person?
Is it raining?
Is it cold outside?
Is it late?
Is it day or night?
Is it Monday today?
Is it warm in here?
Is it dangerous here?
Is it true that the earth is flat?
Is the door locked?
Is the door open?
Is the light on?
Is the water clean?
Is the house old?
Is the house haunted?
Is the room clean?
Is the room warm?
Is the room expensive?
Is the rent high?
Is the owner rich?
Is the air good?
Is the internet fast?
Is the coffee ready?
Is the baby asleep?
Is God real?
Is Spain in Europe?
Is water wet?
Is my mother at home?
Can you dance?
Can you fly?
Can you hear me?
Can you sing?
Can you help me with my homework?
Can you call me a taxi?
Can you cook?
Can you drive a car?
Can you open the door?
Can you recommend a hotel?
Can you speak Spanish?
Can you teach me math?
Can you tell me a story?
Can you think?
Can you write a song?
Can you write an essay?
Can you write a speech for my wedding?
Can I smoke here?
Can I trust you?
Can I move in?
Can I rent this room?
Can I have a coffee?
Can pigs fly?
Could you lend me some money?
Could you send me a message?
Could you write a report?
Could you say that again?
Could you call the owner?
Do you have a name?
Do you have children?
Do you have a job?
Do you like me?
Do you like music?
Do you like this room?
Do you love me?
Do you sleep?
Do you speak German?
Do you believe in ghosts?
Do you know my name?
Do you know who I am?
Do you remember me?
Do you want to be human?
Do I look good?
Do they have children?
Do they have pets?
Do dogs dream?
Does he live alone?
Does it hurt?
Does it rain often here?
Does it smell of smoke?
Does the owner smoke?
Does the house have a garden?
Does the heating work?
Did you sleep well?
Did they pay the rent?
Did it snow?
Did Germany win?
Have you eaten?
Have you been to Rome?
Have you ever been in love?
Should I buy this house?
Should I get a dog?
Should I take an umbrella?
Should I sell my car?
Will it be sunny tomorrow?
Will you be my friend?
Will the stocks go up?
Would you like a coffee?
Would you live here?
May I come in?
Which country won the world cup?
Which team is the best?
Which day is tomorrow?
Which language is that?
Which car should I buy?
Which film won the prize?
Which movie is good?
Which month has 28 days?
Which bus goes downtown?
Which animal is the largest?
Which person lives here?
Which newspaper do you read?
Which year was it painted?
Which street is this?
Please sing.
Please order some food.
Please call an ambulance.
Please check my email.
Please reserve two seats for the theater.
Please translate this sentence.
""".splitlines()

OUTSIDE_OBJECT = """\
How much did the {a} cost?
How much is the {a}?
How much is the {a} worth?
How much money would I get for the {a}?
How much does the {a} weigh?
How many people can use the {a}?
How many years old is the {a}?
How long has the {a} been here?
How long will the {a} last?
How do I clean the {a}?
How do I repair the {a}?
How does the {a} work?
How was the {a} made?
What is the price of the {a}?
What is the weight of the {a}?
What is the age of the {a}?
What is the brand of the {a}?
What is the {a} worth?
What is the {a} for?
What is the history of the {a}?
What is inside the {a}?
What is on the {a}?
What is under the {a}?
What is wrong with the {a}?
What material is the {a}?
What material was used for the {a}?
What does the {a} feel like?
What does the {a} smell like?
What do you think of the {a}?
What do you think about the {a}?
What brand is the {a}?
What style is the {a}?
What can I do with the {a}?
What happened to the {a}?
Which brand is the {a}?
Which company produced the {a}?
Which shop sells the {a}?
Which material is the {a} made from?
Who owns the {a}?
Who made the {a}?
Who bought the {a}?
Who designed the {a}?
Who moved the {a}?
Who uses the {a}?
Who put the {a} there?
Whose {a} is that?
Who is behind the {a}?
When was the {a} made?
When was the {a} bought?
When did they buy the {a}?
Where does the {a} come from?
Where was the {a} made?
Where was the {a} bought?
Where do they sell such a {a}?
Where can I get a {a}?
Why is the {a} so ugly?
Why do they need a {a}?
Why did they buy the {a}?
Why does the {a} stand there?
Can I buy the {a}?
Can I sit on the {a}?
Can I have the {a}?
Can the {a} talk?
Can the {a} swim?
Can the {a} be repaired?
Can you lift the {a}?
Can you move the {a}?
Can you sell me the {a}?
Can you draw the {a}?
Can you write a story about the {a}?
Write a poem about the {a}.
Write a song about a {a}.
Tell me a story about the {a}.
Tell me a joke about a {a}.
Tell me the price of the {a}.
Do you want the {a}?
Do you need a {a}?
Do you own a {a}?
Do you like the {a} or not?
Do you love the {a}?
Does the {a} work?
Does the {a} smell?
Does the {a} make noise?
Does the {a} belong to you?
Does the {a} cost a lot?
Should I buy the {a}?
Should I throw the {a} away?
Would you buy this {a}?
Did you make the {a}?
Did someone use the {a}?
Move the {a}.
Move the {a} to the wall.
Sell the {a}.
Clean the {a}.
Paint the {a}.
Remove the {a}.
Throw away the {a}.
Bring me the {a}.
Buy me a {a}.
Is someone on the {a}?
Is someone behind the {a}?
Is there dust on the {a}?
Is there a cat on the {a}?
Is there something under the {a}?
Is the {a} made of wood?
Is the {a} from Italy?
Is the {a} still under warranty?
""".splitlines()

_ADJECTIVES = (
    "expensive cheap new old modern antique clean dirty broken soft hard warm cold hot empty full heavy light pretty "
    "ugly beautiful nice useful strong safe dangerous famous valuable handmade wooden waterproof rare loud dry wet "
    "real rented alive sad tired friendly hungry"
).split()
OUTSIDE += [f"What is the {what} of {where}?" for what, where in product(
    ("capital", "population", "currency", "president", "flag", "history"),
    ("Spain", "Japan", "Italy", "Brazil", "China"))]  # fmt: skip
OUTSIDE += [f"How much is {one} {sign} {other}?" for one, sign, other in product(
    ("three", "four", "ten", "7", "12"), ("plus", "minus", "times", "divided by"), ("one", "five", "6"))]  # fmt: skip
OUTSIDE += [f'Translate "{word}" into {language}.' for word, language in product(
    ("house", "dog", "love", "water"), ("French", "Spanish", "Italian"))]  # fmt: skip
OUTSIDE += [f"{ask} {what}." for ask, what in product(
    ("Write me", "Can you give me", "Please write", "I want", "Send me"),
    ("a poem", "an essay", "a short story", "a birthday card", "a shopping list", "an invitation"))]  # fmt: skip
OUTSIDE += [f"Who {did} {what}?" for did, what in product(
    ("wrote", "invented", "painted", "discovered", "won"),
    ("this book", "the radio", "that picture", "penicillin", "the game", "the race"))]  # fmt: skip
OUTSIDE_OBJECT += [f"Is the {{a}} {adjective}?" for adjective in _ADJECTIVES]
OUTSIDE_OBJECT += [f"How {adjective} is the {{a}}?" for adjective in _ADJECTIVES if adjective != "heavy"]

TEMPLATES: dict[str, tuple[list[str], ...]] = {
    "count": (COUNT,),
    "meters": (METERS,),
    "centimeters": (CENTIMETERS,),
    "square meters": (SQUARE_METERS,),
    "nearest": (NEAREST,),
    "direction": (DIRECTION,),
    "yes or no": (
        IS_THERE, IS_LEFT, IS_RIGHT, IS_CLOSER_TO, IS_CLOSER_THAN, IS_BIGGER, IS_SMALLER, IS_APART, IS_WITHIN, IS_FAR,
        IS_NEAR, MORE_THAN, AT_LEAST, SEVERAL, EXACTLY_ONE, IS_COLOR, IS_THERE_COLORED, IS_ROOM_LARGER, IS_LONGER_THAN,
    ),
    "order": (FIRST, ORDER),
    "objects": (OBJECTS,),
    "color": (COLOR,),
    "outside": (OUTSIDE, OUTSIDE_OBJECT),
}  # fmt: skip
"""All templates of a form of answers. {a} to {d} are names of objects, {as} and {bs} plurals of kinds."""

_SHARES = {
    "count": 4,
    "meters": 4,
    "centimeters": 3,
    "square meters": 2,
    "nearest": 4,
    "direction": 4,
    "yes or no": 10,
    "order": 3,
    "objects": 2,
    "color": 3,
    "outside": 9,
}
"""How often each form of answers is asked for, in relation to the others."""


def plural(name: str) -> str:
    return name.replace("bookshelf", "bookshelves") if name.endswith("bookshelf") else f"{name}s"


class FreeQuestions:
    """Questions in free wording about a walk through a room.

    As in VSI-Bench's questions of :mod:`spa3r.rooms.questions`, only objects that a picture clearly shows and that have
    a unique name are asked about, and answers are far from every border between two answers.

    Args:
        walk: The room, and what the pictures show of it.
        places: (O, 2), meters of each object to the right and ahead, seen from the first picture.
        rng: Source of all draws.
    """

    def __init__(self, walk: RoomWalk, places: np.ndarray, rng: np.random.Generator):
        self.walk, self.places, self.rng = walk, places, rng
        objects, seen = walk.room.objects, walk.first_clear < len(walk.shares)
        self.seen_kinds = [item.name for item, is_seen in zip(objects, seen) if is_seen]
        self.seen_looks = {(item.name, item.color) for item, is_seen in zip(objects, seen) if is_seen}
        kinds = {item.name for item in objects}
        hidden = {item.name for item, is_seen in zip(objects, seen) if not is_seen}
        self.absent = [kind for kind in FURNITURE if kind not in kinds]
        self.counted = [kind for kind in FURNITURE if kind in kinds - hidden]
        """Kinds whose objects are all seen."""
        self.asked = [int(k) for k in walk.asked]
        self.lengths = [max(item.size) for item in objects]

    def __iter__(self) -> Iterator[Turn]:
        """Endless turns, of each form as often as `_SHARES` says where the room has such questions."""
        forms, shares = list(_SHARES), np.array(list(_SHARES.values()), float)
        makers: dict[str, Callable[[], Turn | None]] = {form: getattr(self, form.replace(" ", "_")) for form in forms}
        while True:
            turn = makers[str(self.rng.choice(forms, p=shares / shares.sum()))]()
            if turn is not None:
                yield self.begun(turn[0]), turn[1]

    def begun(self, question: str) -> str:
        """Some questions with words before them, or in lower case."""
        chance = self.rng.random()
        if chance < 0.1:
            opening = self.pick(OPENINGS)
            return opening + (question if question.startswith("I ") else question[0].lower() + question[1:])
        return question[0].lower() + question[1:].rstrip("?.") if chance < 0.15 else question

    def pick(self, things: Sequence) -> Any:
        return things[int(self.rng.integers(len(things)))]

    def draw(self, number: int) -> list[int] | None:
        """Different objects in random order; None if there are too few."""
        if len(self.asked) < number:
            return None
        return [int(k) for k in self.rng.permutation(self.asked)[:number]]

    def fill(self, template: str, objects: Sequence[int] = (), **slots: Any) -> str:
        names = {slot: self.walk.names[k] for slot, k in zip("abcd", objects)}
        return template.format(**names, **slots)

    # Each of the following returns a question and its answer, or None if the objects that it drew do not allow one.

    def count(self) -> Turn | None:
        if self.absent and self.rng.random() < 0.1:
            return self.pick(COUNT).format(**{"as": plural(self.pick(self.absent))}), "0"
        if not self.counted:
            return None
        numbers = [self.seen_kinds.count(kind) for kind in self.counted]
        several = [kind for kind, number in zip(self.counted, numbers) if number > 1]
        kind = self.pick(several if several and self.rng.random() < 0.6 else self.counted)
        return self.pick(COUNT).format(**{"as": plural(kind)}), str(self.seen_kinds.count(kind))

    def meters(self) -> Turn | None:
        pair = self.draw(2)
        if pair is None or self.walk.distances[tuple(pair)] < 0.5:
            return None
        return self.fill(self.pick(METERS), pair), f"{self.walk.distances[tuple(pair)]:.1f} meters"

    def centimeters(self) -> Turn | None:
        if (one := self.draw(1)) is None:
            return None
        return self.fill(self.pick(CENTIMETERS), one), f"{round(100 * self.lengths[one[0]])} centimeters"

    def square_meters(self) -> Turn:
        length, width, _ = self.walk.room.size
        return self.pick(SQUARE_METERS), f"{length * width:.1f} square meters"

    def nearest(self) -> Turn | None:
        template = self.pick(NEAREST)
        number = 3 if "{c}" in template else 2
        if (drawn := self.draw(number + 1)) is None:
            return None
        *options, to = drawn
        first, second = sorted(options, key=lambda k: self.walk.distances[k, to])[:2]
        if not self.differ(self.walk.distances[second, to], self.walk.distances[first, to], 0.3):
            return None
        return self.fill(template, options, d=self.walk.names[to]), self.walk.names[first]

    def direction(self) -> Turn | None:
        template = self.pick(DIRECTION)
        if (drawn := self.draw(3)) is None or min(self.walk.apart[i, j] for i, j in combinations(drawn, 2)) < 1:
            return None
        stand, facing, target = drawn
        angle = np.degrees(self.walk.bearings[stand, target] - self.walk.bearings[stand, facing])
        angle = (angle + 180) % 360 - 180
        is_choice = "left" in template
        if 15 <= abs(angle) <= 165 if is_choice else 35 <= abs(angle) <= 115:
            return self.fill(template, drawn), "left" if angle > 0 else "right"
        if abs(angle) >= 147 and not is_choice:
            return self.fill(template, drawn), "behind"
        return None

    def order(self) -> Turn | None:
        template = self.pick(self.pick((FIRST, ORDER)))
        if (drawn := self.draw(3 if "{c}" in template else 2)) is None:
            return None
        ordered = sorted(drawn, key=lambda k: self.walk.first_clear[k])
        if any(self.walk.first_clear[one] >= self.walk.first_trace[other] for one, other in pairwise(ordered)):
            return None
        names = [self.walk.names[k] for k in ordered]
        return self.fill(template, drawn), ", ".join(names) if template in ORDER else names[0]

    def objects(self) -> Turn | None:
        kinds = [kind for kind in FURNITURE if kind in self.seen_kinds]
        return (self.pick(OBJECTS), ", ".join(kinds)) if kinds else None

    def color(self) -> Turn | None:
        if (one := self.draw(1)) is None:
            return None
        return self.fill(self.pick(COLOR), one), self.walk.room.objects[one[0]].color

    def outside(self) -> Turn | None:
        if self.rng.random() < 0.6:
            return self.pick(OUTSIDE), REFUSAL
        if (one := self.draw(1)) is None:
            return None
        return self.fill(self.pick(OUTSIDE_OBJECT), one), REFUSAL

    def yes_or_no(self) -> Turn | None:
        ask = self.pick((self.is_there,) * 3 + (self.is_beside,) * 2 + (self.is_closer,) * 2 + (self.is_colored,) * 2
                        + (self.is_bigger, self.is_apart, self.is_near, self.are_more, self.is_larger))  # fmt: skip
        found = ask()
        return found and (found[0], "yes" if found[1] else "no")

    def is_there(self) -> tuple[str, bool] | None:
        there = bool(self.rng.random() < 0.5)
        if self.rng.random() < 0.15:
            looks = [(k, c) for k in FURNITURE for c in COLORS if ((k, c) in self.seen_looks) is there]
            looks = [look for look in looks if there or look[0] in self.counted]
            if not looks:
                return None
            kind, color = self.pick(looks)
            return self.pick(IS_THERE_COLORED).format(a=kind, color=color), there
        kinds = self.seen_kinds if there else self.absent
        if not kinds:
            return None
        kind = self.pick(kinds)
        return self.pick(IS_THERE).format(a=kind, **{"as": plural(kind)}), there

    def is_beside(self) -> tuple[str, bool] | None:
        pair = self.draw(2)
        if pair is None or abs(gap := self.places[pair[1], 0] - self.places[pair[0], 0]) < 0.7:
            return None
        left = bool(self.rng.random() < 0.5)
        return self.fill(self.pick(IS_LEFT if left else IS_RIGHT), pair), bool(gap > 0) is left

    def is_closer(self) -> tuple[str, bool] | None:
        if (drawn := self.draw(3)) is None:
            return None
        a, b, c = drawn
        than = bool(self.rng.random() < 0.5)
        near, far = self.walk.distances[a, b], self.walk.distances[(c, b) if than else (a, c)]
        if not self.differ(near, far, 0.3):
            return None
        return self.fill(self.pick(IS_CLOSER_THAN if than else IS_CLOSER_TO), drawn), bool(near < far)

    def is_colored(self) -> tuple[str, bool] | None:
        if (one := self.draw(1)) is None:
            return None
        own, is_true = self.walk.room.objects[one[0]].color, bool(self.rng.random() < 0.5)
        color = own if is_true else self.pick([color for color in COLORS if color != own])
        return self.fill(self.pick(IS_COLOR), one, color=color), is_true

    def is_bigger(self) -> tuple[str, bool] | None:
        pair = self.draw(2)
        if pair is None or not self.differ(*(lengths := [self.lengths[k] for k in pair]), 0.1):
            return None
        bigger = bool(self.rng.random() < 0.6)
        return self.fill(self.pick(IS_BIGGER if bigger else IS_SMALLER), pair), bool(lengths[0] > lengths[1]) is bigger

    def is_apart(self) -> tuple[str, bool] | None:
        if (pair := self.draw(2)) is None:
            return None
        limit, distance = self.pick(range(1, 5)), self.walk.distances[tuple(pair)]
        if abs(distance - limit) < 0.3:
            return None
        apart, number = bool(self.rng.random() < 0.5), self.pick((str(limit), NUMBERS[limit]))
        n = f"{number} meter{'s' * (limit > 1)}"
        return self.fill(self.pick(IS_APART if apart else IS_WITHIN), pair, n=n), bool(distance > limit) is apart

    def is_near(self) -> tuple[str, bool] | None:
        if (pair := self.draw(2)) is None:
            return None
        distance, far = self.walk.distances[tuple(pair)], bool(self.rng.random() < 0.4)
        if abs(distance - (3 if far else 1)) < 0.3:
            return None
        return self.fill(self.pick(IS_FAR if far else IS_NEAR), pair), bool(distance > 3 if far else distance < 1)

    def are_more(self) -> tuple[str, bool] | None:
        if len(self.counted) < 2:
            return None
        kinds = self.rng.permutation(self.counted)[:2].tolist()
        numbers = [self.seen_kinds.count(kind) for kind in kinds]
        limit = self.pick((2, 3))
        template, truth = self.pick((
            (MORE_THAN, numbers[0] > numbers[1]), (AT_LEAST, numbers[0] >= limit), (SEVERAL, numbers[0] > 1),
            (EXACTLY_ONE, numbers[0] == 1),
        ))  # fmt: skip
        slots = {"as": plural(kinds[0]), "bs": plural(kinds[1]), "a": kinds[0], "n": NUMBERS[limit]}
        return self.pick(template).format(**slots), truth

    def is_larger(self) -> tuple[str, bool] | None:
        if self.rng.random() < 0.5:
            area, limit = float(np.prod(self.walk.room.size[:2])), self.pick(range(10, 31))
            if abs(area - limit) < 2:
                return None
            return self.pick(IS_ROOM_LARGER).format(n=limit), area > limit
        if (one := self.draw(1)) is None:
            return None
        limit, length = self.pick((0.5, 1.0, 1.5, 2.0)), self.lengths[one[0]]
        if abs(length - limit) < 0.1:
            return None
        n = self.pick((f"{round(100 * limit)} centimeters", f"{limit:g} meter{'s' * (limit != 1)}"))
        return self.fill(self.pick(IS_LONGER_THAN), one, n=n), length > limit

    @staticmethod
    def differ(one: float, other: float, margin: float) -> bool:
        """Whether two lengths differ by a factor and by a margin in meters."""
        low, high = sorted((one, other))
        return bool(high >= max(CLEARLY * low, low + margin))
