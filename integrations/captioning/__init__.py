"""`apt-hooks caption`: captions that leave the subject to its token, beside the photos of a training.

What the captions of photos have in common goes into the token, what they tell goes elsewhere. So they describe the
background and everything else in detail, and the subject by its words alone; `prompt.md` asks a vision-language model
for that, and is sent as it stands, `{subject}` and `{class_word}` filled in. What comes back (`answers`) becomes one
line; where it lacks the subject's words, "a photo of SUBJECT, " is put in front of it.
"""
