r"""Tweets into words, in the order of paper 001, section 3. No torch here.

1. remove HTML tags; 2. lower-case; 3. emojis into words; 4. delete numbers; 5. delete
punctuation; then words. Where the report is silent:

- Before all, what TweetEval escapes is put back: a backslash with n is a line break, `&amp;` is
  `&`. Else punctuation would leave the letter n and the word amp behind.
- A tag is `<` followed by a letter, `/` or `!`, up to `>`; `<3` is none. White space stands where
  it was, so that words around `<br>` stay apart.
- Names of emojis are lower-cased as they are put in, because step 2 is past.
- Digits go out of words too (`gr8` leaves `gr`). Numbers are Unicode's N categories; Chinese
  numerals are letters there.
- Punctuation is Unicode's P and S categories, as Python's `string.punctuation` is for ASCII.
  Apostrophes vanish, as GloVe has `dont`; other marks leave white space, so that the words of
  `happy-go-lucky` and the name of an emoji stay apart.
- Words are what stands between white space.
"""

import html
import re
import unicodedata

_TAG = re.compile(r"<(?:!--.*?--|[a-z/!][^<>]*)>", re.IGNORECASE | re.DOTALL)
_APOSTROPHES = "'’‘ʼ`"


def words(text: str) -> list[str]:
    r"""Return the words of a tweet; none are left of one that is all marks and numbers.

    >>> words(r"<b>SO</b> happy-ish\nI can't 😂 #2022 <3")
    ['so', 'happy', 'ish', 'i', 'cant', 'face', 'with', 'tears', 'of', 'joy']
    """
    text = unescape(text)
    text = remove_tags(text)
    text = text.lower()
    text = name_emojis(text)
    text = delete_numbers(text)
    return delete_punctuation(text).split()


def unescape(text: str) -> str:
    r"""Put back what TweetEval's files escape.

    >>> unescape("a\\nb &amp; c")
    'a\nb & c'
    """
    return html.unescape(text.replace("\\n", "\n"))


def remove_tags(text: str) -> str:
    """Replace HTML tags and comments by a space.

    >>> remove_tags("so<br/>sad <3 a < b")
    'so sad <3 a < b'
    """
    return _TAG.sub(" ", text)


def name_emojis(text: str) -> str:
    """Replace emojis by their names in Unicode's English short form.

    >>> name_emojis("ha🤶")
    'ha mrs._claus '
    """
    import emoji  # its table takes a while, and only tweets need it

    return emoji.replace_emoji(text, lambda sign, _: emoji.demojize(sign, (" ", " ")).lower())


def delete_numbers(text: str) -> str:
    """Delete digits and other number signs, wherever they stand.

    >>> delete_numbers("gr8, 3.14 and ½")
    'gr, . and '
    """
    return "".join(sign for sign in text if unicodedata.category(sign)[0] != "N")


def delete_punctuation(text: str) -> str:
    """Delete apostrophes and signs without width, and replace other marks by a space.

    >>> delete_punctuation("don't: 'e-mail' €")
    'dont  e mail  '
    """
    return "".join(_without_mark(sign) for sign in text)


def _without_mark(sign: str) -> str:
    if sign in _APOSTROPHES:
        return ""
    category = unicodedata.category(sign)
    if category[0] in "PS":
        return " "
    # Joiners and variation selectors, of which emojis leave some behind, and control characters
    # that are no white space.
    invisible = category in ("Cf", "Cc", "Co", "Cn") or "\ufe00" <= sign <= "\ufe0f"
    return "" if invisible and not sign.isspace() else sign
