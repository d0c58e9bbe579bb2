"""What is cut out of texts of one kind: whole lines, and tails of articles. A text that keeps no line is dropped."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """Lines to cut (by a pattern for the whole line), pieces of lines to cut, and headings that end the text."""

    lines: re.Pattern
    pieces: re.Pattern | None = None
    tail: re.Pattern | None = None

    def cut(self, text: str) -> str:
        kept = []
        for line in text.split("\n"):
            bare = line.strip()
            if self.tail and self.tail.fullmatch(bare):
                break
            if bare and self.lines.fullmatch(bare):
                continue
            kept.append(self.pieces.sub("", line).rstrip() if self.pieces else line)
        return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def _pattern(*alternatives: str) -> re.Pattern:
    return re.compile("|".join(alternatives), re.IGNORECASE)


_DATE = r"\d{1,2}[/.-]\d{1,2}[/.-]\d{2,4}|\d{1,2} de \w+ de \d{4}"

KINDS = {
    # Credits of who made the subtitles, numbers and times of captions, notes, and sounds in brackets.
    "subtitles": Kind(
        _pattern(
            r"(legendas?|legendagem|tradução|revisão|sincronização|transcrição|ripp?ed|subtitles?)\b.{0,60}(:|por|by).*",
            r".*\b(opensubtitles|legendas\.tv|podnapisi)\b.*",
            r"\d+",
            r"[\d:,.]+ *--> *[\d:,.]+",
            r"[♪♫#* ]+",
            r"[\[(][^\])]*[\])]",
        ),
        pieces=re.compile(r"<[^<>]{1,40}>|\{\\[^{}]{1,40}\}|[♪♫]|\[[^\]]{1,60}\]"),
    ),
    # What stays of markup, and the sections behind an article's text.
    "wiki": Kind(
        _pattern(r"(ficheiro|imagem|arquivo|file|categoria|category):.*", r"[{}|!=*#:;\[\]' -]+", r"\{\|.*|\|[}\-].*"),
        pieces=re.compile(r"\[\d{1,3}\]|\[(editar|carece de fontes[^\]]*|nota \d+)\]", re.IGNORECASE),
        tail=_pattern(
            r"=* *(referências|notas|notas e referências|ligações externas|ver também|bibliografia|fontes|leitura "
            r"(adicional|complementar))( bibliográficas)? *=*:?"
        ),
    ),
    # Lines of the page around the article. A word that only begins like one of them is no such line.
    "news": Kind(
        _pattern(
            r"(leia|veja|ouça|saiba) (também|mais)\b.*",
            r"(partilh(e|ar)|compartilh(e|ar)|imprimir|enviar por e-?mail|comentários?|comentar|tweet)\b[^.]{0,40}",
            r"(publicado|atualizado|actualizado|última atualização)( (a|em|por|há)\b|:).{0,60}",
            rf"({_DATE})[ ,|-]*[\d:h]*",
            r"(foto|fotografia|imagem|crédito|créditos)s?: .{1,80}",
            r"(subscreva|assine|registe-se|inicie sessão)\b.{0,120}",
            r".{0,80}\b(utiliza|usa) cookies\b.*",
            r"(política de privacidade|termos (e condições|de utilização)|todos os direitos reservados)\b.{0,80}",
        )
    ),
    # What the stenographers noted that nobody said.
    "parliament": Kind(
        _pattern(
            r"(aplausos|risos|protestos|vozes|pausa|contraprotestos)\b[^:]{0,120}\.?",
            r"vozes d.{1,40}: ?[-—–] ?(muito bem|apoiado|exactamente|exatamente|claro)!",
            r"(submetido|submetida)s? à votação, .{1,200}",
            r"(o|a) (orador|oradora) reviu\b.*",
            r"\d+|[ivxl]+ série ?[-—–].*",
        )
    ),
}
