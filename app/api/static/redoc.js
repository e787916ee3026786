"use strict";

const FONT = "system-ui, sans-serif";

Redoc.init(
  "/openapi.json",
  {
    nativeScrollbars: true,
    theme: { typography: { fontFamily: FONT, headings: { fontFamily: FONT } } },
  },
  document.getElementById("redoc"),
);
