const plots = plotsOf(JSON.parse(document.getElementById("data").textContent));
const drawAll = () => plots.forEach(draw);
drawAll();
onTheme(drawAll);
explain(document);
