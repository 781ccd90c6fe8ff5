// The theme's search is a dialog without a name, which screen readers miss.
document.querySelectorAll(".md-search").forEach(search => search.setAttribute("aria-label", "Search"));
