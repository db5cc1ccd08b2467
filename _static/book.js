// A page opened as a file may not read its neighbours, so search shows titles without summaries there.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
