"""The `pals` command: one file per noun; `console` alone prints."""
